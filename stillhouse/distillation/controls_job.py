"""Controls as tasks: real images chosen without any synthesis, for the bytes of a distilled set."""

from dataclasses import dataclass
from typing import Literal

import torch

from stillhouse.distillation.baselines import herding, k_centre, random_real
from stillhouse.distillation.prepared import Prepared
from stillhouse.distillation.stored_sets import LabelledSet, pixel_set, rounded_set, set_table
from stillhouse.storage.artifact import Receipt, Store

KIND = "distilled"
ControlName = Literal["random_real", "herding", "k_centre"]


@dataclass(frozen=True, slots=True)
class ControlTask:
    """A control set to choose."""

    fingerprint: str
    name: ControlName
    images_per_class: int
    seed: int


def run_control(store: Store, prepared: Prepared, task: ControlTask) -> Receipt:
    """Choose the images, commit the set, then its receipt.

    Raises:
        InputError: a class has too few images.
    """
    labels = prepared.train_labels.cpu().numpy()
    if task.name == "random_real":
        rows = random_real(labels, task.images_per_class, seed=task.seed)
    else:
        choose = herding if task.name == "herding" else k_centre
        rows = choose(prepared.train.flatten(1).cpu().numpy(), labels, task.images_per_class)
    made = _set(prepared, torch.from_numpy(rows))
    part = store.put_part(f"{KIND}/parts/{task.fingerprint}.parquet", set_table(made), num_tokens=0)
    return store.put_receipt(KIND, Receipt(task.fingerprint, (part,), {"images": len(rows)}))


def _set(prepared: Prepared, rows: torch.Tensor) -> LabelledSet:
    """Real images: their own 8 bits, or those of whitened ones."""
    there = rows.to(prepared.device)
    images, labels = prepared.train[there], prepared.train_labels[there]
    if prepared.zca is not None:
        return rounded_set(images, labels, prepared.num_classes)
    norm = prepared.standardisation
    return pixel_set(images, labels, prepared.num_classes, norm.mean, norm.std)
