"""What is refused of a distil job as soon as its images are known: before any training."""

import numpy as np

from stillhouse.distillation.methods import Infer
from stillhouse.distillation.settings import PatchSettings
from stillhouse.distillation.spec import DistillSpec
from stillhouse.distillation.storage_budget import compensator_budget
from stillhouse.distillation.stored_images import SPLITS
from stillhouse.errors import InputError
from stillhouse.storage.artifact import Manifest, Store
from stillhouse.storage.parquet import read_table


def check_counts(store: Store, spec: DistillSpec, images: Manifest) -> None:
    """The budget can be had, and every class has as many training images as the method takes.

    Raises:
        BudgetError: INFER has no room for a real image.
        InputError: naming the class with the fewest images, and the keys to change.
    """
    method, classes = spec.method, len(images.totals["class_names"])
    if isinstance(method, Infer):
        compensator_budget(method.images_per_class, len(spec.teachers or []), classes)
    factor = method.factor if isinstance(method, PatchSettings) else 1
    wanted = method.images_per_class * factor**2
    if images.totals["least_per_class"] >= wanted:
        return
    name, least = _smallest_class(store, images)
    what = f"{wanted} are needed"
    lower = "`method.images_per_class`"
    if factor > 1:
        what += f" ({factor} x {factor} to an image)"
        lower += " or `method.factor`"
    raise InputError(
        f"class {name!r} has {least} training images, {what}: lower {lower}, or add images"
    )


def _smallest_class(store: Store, images: Manifest) -> tuple[str, int]:
    """The class with the fewest training images, and how many."""
    part = images.parts[SPLITS.index("train")]
    labels = read_table(store.path(part.path), ["label"])["label"].to_numpy()
    names = images.totals["class_names"]
    counts = np.bincount(labels, minlength=len(names))
    least = int(counts.argmin())
    return names[least], int(counts[least])
