"""Labelled images in memory: what is accepted, how it is split, what is refused.

Pure: arrays in, arrays out. Files are read in `image_sources`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.distillation.image_files import DeadImage, Label, Pixels
from stillhouse.errors import InputError


@dataclass(frozen=True, slots=True)
class ImageSet:
    """N images with their classes.

    Attributes:
        images: uint8 [N, C, H, W].
        labels: int64 [N], indices into `class_names`.
        class_names: in label order; every class has an image in the training set.
        dead_letters: the images that could not be read.
    """

    images: Pixels
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    dead_letters: tuple[DeadImage, ...] = ()

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self) -> NDArray[np.float32]:
        """All images as float32 in [0, 1]."""
        return self.images.astype(np.float32) / np.float32(255)

    def take(self, rows: NDArray[np.integer]) -> "ImageSet":
        """The images of some rows, in their order."""
        return ImageSet(self.images[rows], self.labels[rows], self.class_names, self.dead_letters)


def image_set(
    images: Pixels,
    labels: Sequence[Label] | NDArray[Any],
    *,
    class_names: Sequence[str] | None = None,
    complete: bool = True,
    place: str = "the arrays",
    dead_letters: Sequence[DeadImage] = (),
) -> ImageSet:
    """Arrays as an `ImageSet` with checked labels.

    Args:
        images: uint8 [N, C, H, W].
        labels: [N], integers from 0 or names; integers are indices into `class_names` if given.
        class_names: fixes the classes and their order; a test set's are its training set's.
        complete: whether every class must have an image; a test set need not.
        place: where they come from, for the messages.
        dead_letters: carried along.

    Raises:
        InputError: labels out of range or of two kinds, one class, an empty class.
    """
    names = tuple(class_names) if class_names is not None else _class_names(labels, place)
    indices = _label_indices(labels, names, place)
    if complete:
        _check_classes(indices, names, place)
    return ImageSet(images, indices, names, tuple(dead_letters))


def split(images: ImageSet, share: float, *, seed: int, key: str) -> tuple[ImageSet, ImageSet]:
    """(rest, part): the part has `share` of every class, at least one image, drawn by the seed.

    Raises:
        InputError: a class with one image, which cannot stand on both sides; `key` names the
            setting that asked.
    """
    rng = np.random.default_rng(seed)
    chosen = np.zeros(len(images), bool)
    for label, name in enumerate(images.class_names):
        rows = np.flatnonzero(images.labels == label)
        if len(rows) < 2:
            raise InputError(
                f"class {name!r} has {len(rows)} image, `{key}` needs at least 2 to split"
            )
        count = min(max(round(share * len(rows)), 1), len(rows) - 1)
        chosen[rng.permutation(rows)[:count]] = True
    return images.take(np.flatnonzero(~chosen)), images.take(np.flatnonzero(chosen))


def _class_names(labels: Sequence[Label] | NDArray[Any], place: str) -> tuple[str, ...]:
    """Numbers count from 0; names are sorted, by value if all of them are numbers."""
    distinct = set(np.asarray(labels).tolist()) if len(labels) else set[Any]()
    if all(isinstance(label, int) for label in distinct):
        if max(distinct, default=0) >= max(len(labels), 1):
            raise InputError(
                f"{place}: label {max(distinct)} is out of range for {len(labels)} images: labels "
                "count from 0 and every class has an image"
            )
        return tuple(str(label) for label in range(max(distinct, default=-1) + 1))
    if not all(isinstance(label, str) for label in distinct):
        raise InputError(f"{place}: labels are neither all integers nor all names")
    numbers = all(re.fullmatch(r"[0-9]+", label) for label in distinct)
    return tuple(sorted(distinct, key=lambda label: (int(label) if numbers else 0, label)))


def _label_indices(
    labels: Sequence[Label] | NDArray[Any], names: tuple[str, ...], place: str
) -> NDArray[np.int64]:
    index = {name: i for i, name in enumerate(names)}
    values = np.asarray(labels).tolist()
    found = [label if isinstance(label, int) else index.get(label, -1) for label in values]
    for row, (label, value) in enumerate(zip(found, values, strict=True)):
        if not 0 <= label < len(names):
            raise InputError(
                f"{place}: label {value!r} of image {row} is out of range, the classes are "
                f"{_listed(names)}"
            )
    return np.array(found, np.int64)


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names) if len(names) <= 6 else f"{names[0]}, {names[1]}, ... {names[-1]}"


def _check_classes(labels: NDArray[np.int64], names: tuple[str, ...], place: str) -> None:
    if len(names) < 2:
        raise InputError(f"{place}: {len(names)} class ({_listed(names)}), at least 2 are needed")
    for label, count in enumerate(np.bincount(labels, minlength=len(names))):
        if not count:
            raise InputError(f"{place}: class {names[label]!r} has no image; labels count from 0")
