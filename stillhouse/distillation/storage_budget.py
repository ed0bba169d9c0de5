"""What a distilled set costs to store, labels included, and how many real images that buys.

Bytes are counted uncompressed, in the precision that is stored. Views of a set (crops, flips,
mixing) are drawn again from their seed and cost nothing; what a teacher said of them does.
"""

import math
from dataclasses import dataclass

from stillhouse.errors import BudgetError

HALF = 2
"""Bytes of a float16 label value."""


@dataclass(frozen=True, slots=True)
class StoredBytes:
    """Bytes of a set's images (compensators included) and of its labels of every kind."""

    images: int
    labels: int

    @property
    def total(self) -> int:
        """Both."""
        return self.images + self.labels


def image_bytes(num_images: int, shape: tuple[int, int, int], value_bytes: int = 1) -> int:
    """Images of a (C, H, W): 1 byte a value for 8-bit pixels, 4 for float32."""
    return num_images * math.prod(shape) * value_bytes


def hard_label_bytes(num_images: int, num_classes: int) -> int:
    """One class index an image: a byte up to 256 classes, else two."""
    return num_images * (1 if num_classes <= 256 else 2)


def soft_label_bytes(num_labels: int, num_classes: int, value_bytes: int = HALF) -> int:
    """One vector of logits a label: one an image if static, one a view (epochs x images) if not."""
    return num_labels * num_classes * value_bytes


def distance_label_bytes(num_views: int, value_bytes: int = HALF) -> int:
    """DBR: two distances a view instead of `num_classes` logits."""
    return num_views * 2 * value_bytes


def compensator_budget(images_per_class: int, num_teachers: int, num_classes: int) -> int:
    """INFER's K = floor(IPC / (1 + M / C)), in whole numbers: real images per class.

    Each of M teachers gives a compensator for each k, shared by all C classes.

    Raises:
        BudgetError: K would be 0; names the smallest number of images per class that is enough.
    """
    num_real = images_per_class * num_classes // (num_classes + num_teachers)
    if num_real < 1:
        smallest = -(-(num_classes + num_teachers) // num_classes)
        raise BudgetError(
            f"`method.images_per_class: {images_per_class}` leaves INFER no real image: with "
            f"{num_teachers} teachers and {num_classes} classes at least {smallest} are needed "
            "(or fewer `teachers`)"
        )
    return num_real
