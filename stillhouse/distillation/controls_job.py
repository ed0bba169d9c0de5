"""Controls as tasks: real images chosen without any synthesis, for the bytes of a distilled set."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from stillhouse.distillation.baselines import Rows, herding, k_centre, random_real
from stillhouse.distillation.prepared import Prepared
from stillhouse.distillation.stored_sets import LabelledSet, pixel_set, rounded_set, set_table
from stillhouse.storage.artifact import Receipt, Store

KIND = "distilled"
ControlName = Literal["random_real", "herding", "k_centre"]


@dataclass(frozen=True, slots=True)
class ControlTask:
    """A control set of `num_images` to choose; where classes do not share evenly, by lot."""

    fingerprint: str
    name: ControlName
    num_images: int
    seed: int


def run_control(store: Store, prepared: Prepared, task: ControlTask) -> Receipt:
    """Choose the images, commit the set, then its receipt.

    Raises:
        InputError: a class has too few images.
    """
    labels = prepared.train_labels.cpu().numpy()
    each = -(-task.num_images // prepared.num_classes)
    if task.name == "random_real":
        rows = random_real(labels, each, seed=task.seed)
    else:
        choose = herding if task.name == "herding" else k_centre
        rows = choose(prepared.train.flatten(1).cpu().numpy(), labels, each)
    rows = without_last(rows.reshape(-1, each), task.num_images, task.seed)
    made = _set(prepared, torch.from_numpy(rows))
    part = store.put_part(f"{KIND}/parts/{task.fingerprint}.parquet", set_table(made), num_tokens=0)
    return store.put_receipt(KIND, Receipt(task.fingerprint, (part,), {"images": len(rows)}))


def without_last(by_class: Rows, num_images: int, seed: int) -> Rows:
    """`num_images` of rows [num_classes, n]: classes drawn by lot do without their last one."""
    lot = np.random.default_rng(seed).permutation(len(by_class))
    kept = np.ones(by_class.shape, bool)
    kept[lot[: by_class.size - num_images], -1] = False
    return by_class[kept]


def _set(prepared: Prepared, rows: torch.Tensor) -> LabelledSet:
    """Real images: their own 8 bits, or those of whitened ones."""
    there = rows.to(prepared.device)
    images, labels = prepared.train[there], prepared.train_labels[there]
    if prepared.zca is not None:
        return rounded_set(images, labels, prepared.num_classes)
    norm = prepared.standardisation
    return pixel_set(images, labels, prepared.num_classes, norm.mean, norm.std)
