"""The decoupled methods as tasks: units that know nothing of one another, then one assembly.

A unit is a batch (SRe2L), a teacher and an index (INFER), a class (RDED, and NRR-DD's start), or a
batch again (NRR-DD's refinement). It draws from its own generator, and its images are a part with a
receipt of its own, so that any number of workers makes the same set, and a killed run redoes only
the units in flight.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save
from torch import Tensor, nn

from stillhouse.distillation.baselines import random_real
from stillhouse.distillation.evaluate import Protocol
from stillhouse.distillation.evaluate_job import LABEL_SEED
from stillhouse.distillation.infer import compensate, compensated_set
from stillhouse.distillation.labels import mean_logits, relabel
from stillhouse.distillation.list_columns import flat_values, lists
from stillhouse.distillation.methods import DecoupledMethod, Infer, NrrDd, Rded, Sre2l
from stillhouse.distillation.nrr_dd import critical_patches, distance_labels, refine
from stillhouse.distillation.prepared import Prepared
from stillhouse.distillation.rded import distil_class
from stillhouse.distillation.sre2l import recover, recovery_batches
from stillhouse.distillation.storage_budget import (
    StoredBytes,
    compensator_budget,
    distance_label_bytes,
    soft_label_bytes,
)
from stillhouse.distillation.stored_sets import (
    LabelledSet,
    expanded_set,
    pixel_set,
    set_table,
    with_logits,
)
from stillhouse.fingerprint import fingerprint, sha256
from stillhouse.models.device import peak_bytes, reset_peak
from stillhouse.storage.artifact import Receipt, Store
from stillhouse.storage.commit import create_or_adopt
from stillhouse.storage.parquet import read_table

KIND = "distilled"
Stage = Literal["start", "make"]


@dataclass(frozen=True, slots=True)
class MethodTask:
    """One unit of a decoupled method.

    Attributes:
        fingerprint: its receipt's name.
        method: all settings.
        teacher: index of the teacher that it asks.
        unit: its number among the units of its kind: batch, INFER's index, or class.
        stage: `start` for NRR-DD's patches, `make` for everything else.
        starts: paths of NRR-DD's patches by class, for its refinement.
    """

    fingerprint: str
    method: DecoupledMethod
    teacher: int
    unit: int
    stage: Stage = "make"
    starts: tuple[str, ...] = ()


def plan_units(
    name: str, method: DecoupledMethod, num_teachers: int, num_classes: int
) -> list[MethodTask]:
    """The first stage's units of the distillation `name`.

    Raises:
        BudgetError: INFER has no room for a real image.
    """
    stage: Stage = "make"
    if isinstance(method, Sre2l):
        batches = recovery_batches(num_classes, method.images_per_class, method.batch_size)
        keys = [(0, unit) for unit in range(len(batches))]
    elif isinstance(method, Infer):
        num_real = compensator_budget(method.images_per_class, num_teachers, num_classes)
        keys = [(m, k) for m in range(num_teachers) for k in range(num_real)]
    else:
        stage = "start" if isinstance(method, NrrDd) else "make"
        keys = [(0, label) for label in range(num_classes)]
    return [
        MethodTask(fingerprint(["unit", name, stage, m, unit]), method, m, unit, stage)
        for m, unit in keys
    ]


def plan_refinement(
    name: str, method: NrrDd, num_classes: int, starts: Sequence[str]
) -> list[MethodTask]:
    """NRR-DD's second stage, in batches of all classes."""
    batches = recovery_batches(num_classes, method.images_per_class, method.batch_size)
    return [
        MethodTask(
            fingerprint(["unit", name, "make", 0, unit]), method, 0, unit, "make", (*starts,)
        )
        for unit in range(len(batches))
    ]


def run_unit(
    store: Store, prepared: Prepared, teachers: Sequence[nn.Module], task: MethodTask
) -> Receipt:
    """Make a unit's images and commit them.

    Raises:
        InputError: a class with too few images. DivergedError: a loss is NaN or infinite.
    """
    reset_peak(prepared.device)
    started = perf_counter()
    images, losses = _make(store, prepared, teachers[task.teacher], task)
    part = store.put_part(f"{KIND}/parts/{task.fingerprint}.parquet", _table(images), num_tokens=0)
    info: dict[str, Any] = {
        "losses": losses,
        "seconds": perf_counter() - started,
        "peak_bytes": peak_bytes(prepared.device),
    }
    counts = {"images": len(images)}
    return store.put_receipt(KIND, Receipt(task.fingerprint, (part,), counts, info))


def _make(
    store: Store, prepared: Prepared, teacher: nn.Module, task: MethodTask
) -> tuple[Tensor, list[float]]:
    method, device, norm = task.method, prepared.device, prepared.standardisation
    if isinstance(method, Infer):
        chosen = _infer_real(prepared, task.unit + 1, method.seed)[task.unit]
        classes = torch.arange(prepared.num_classes, device=device)
        rng = np.random.default_rng([method.seed, task.teacher, task.unit])
        return compensate(teacher, chosen, classes, method, rng=rng)
    rng = np.random.default_rng([method.seed, task.unit])
    if isinstance(method, Rded) or task.stage == "start":
        return _patches(teacher, prepared, method, task.unit, rng), []
    assert isinstance(method, Sre2l | NrrDd)
    batches = recovery_batches(prepared.num_classes, method.images_per_class, method.batch_size)
    labels = batches[task.unit].to(device)
    if isinstance(method, Sre2l):
        return recover(teacher, labels, prepared.shape, method, norm, rng=rng)
    initial = torch.stack([unit_images(store, path, prepared.shape) for path in task.starts], 1)
    images = initial.flatten(0, 1).split(method.batch_size)[task.unit].to(device)
    return refine(teacher, images, labels, method, norm)


def _infer_real(prepared: Prepared, num_real: int, seed: int) -> list[Tensor]:
    """INFER's K real images of every class, random: K tensors [num_classes, C, H, W].

    Raises:
        InputError: a class has fewer images.
    """
    rows = random_real(prepared.train_labels.cpu().numpy(), num_real, seed=seed)
    by_index = torch.from_numpy(rows).view(prepared.num_classes, num_real).T
    return [prepared.train[index.to(prepared.device)] for index in by_index]


def _patches(
    teacher: nn.Module,
    prepared: Prepared,
    method: DecoupledMethod,
    label: int,
    rng: np.random.Generator,
) -> Tensor:
    """RDED's images of a class, or the patches that NRR-DD refines."""
    assert isinstance(method, Rded | NrrDd)
    least_sure = isinstance(method, NrrDd) and method.least_sure
    options: dict[str, Any] = {
        "images_per_class": method.images_per_class,
        "settings": method,
        "rng": rng,
    }
    make = critical_patches if least_sure else distil_class
    return make(teacher, prepared.train, prepared.train_labels, label, **options)


def _table(images: Tensor) -> pa.Table:
    return pa.table({"values": lists(images.detach().cpu().flatten(1).numpy())})


def unit_images(store: Store, path: str, shape: tuple[int, int, int]) -> Tensor:
    """A unit's standardised images [n, *shape]."""
    values = flat_values(read_table(store.path(path)), "values")
    return torch.from_numpy(values).reshape(-1, *shape)


@dataclass(frozen=True, slots=True)
class AssemblyTask:
    """What to put together: paths of the units' parts, in order."""

    fingerprint: str
    method: DecoupledMethod
    protocol: Protocol
    units: tuple[str, ...]


def run_assembly(
    store: Store, prepared: Prepared, teachers: Sequence[nn.Module], task: AssemblyTask
) -> Receipt:
    """Put the units' images together, label them, commit the set, then its receipt."""
    method, name = task.method, task.fingerprint
    made = [unit_images(store, path, prepared.shape) for path in task.units]
    given = _joined(prepared, method, made, len(teachers))
    kind = getattr(method, "labels", "classes")
    images = given.images.to(prepared.device)
    if kind == "static":
        given = with_logits(given, mean_logits(teachers, images))
    path = digest = None
    stored, files = given.stored, dict[str, str]()
    if kind in ("views", "distances"):
        classes = given.labels.to(prepared.device)
        labels = _view_labels(teachers, images, classes, method, task.protocol)
        data = save({"labels": labels.cpu().contiguous()})
        path = f"{KIND}/parts/{name}.labels.safetensors"
        digest = sha256(create_or_adopt(store.path(path), data))
        files[path] = digest
        views = labels.shape[0] * labels.shape[1]
        cost = (
            distance_label_bytes(views)
            if kind == "distances"
            else soft_label_bytes(views, prepared.num_classes)
        )
        stored = StoredBytes(given.stored.images, given.stored.labels + cost)
    part = store.put_part(f"{KIND}/parts/{name}.parquet", set_table(given), num_tokens=0)
    info: dict[str, Any] = {
        "label_path": path,
        "label_sha256": digest,
        "stored": [stored.images, stored.labels],
    }
    return store.put_receipt(KIND, Receipt(name, (part,), {"images": part.num_rows}, info, files))


def _joined(
    prepared: Prepared, method: DecoupledMethod, made: list[Tensor], num_teachers: int
) -> LabelledSet:
    classes, norm = prepared.num_classes, prepared.standardisation
    count = method.images_per_class
    if isinstance(method, Infer):
        num_real = len(made) // num_teachers
        chosen = [images.cpu() for images in _infer_real(prepared, num_real, method.seed)]
        by_teacher = [made[m * num_real : (m + 1) * num_real] for m in range(num_teachers)]
        return expanded_set(compensated_set(chosen, by_teacher, norm), norm.mean, norm.std)
    if isinstance(method, Sre2l | NrrDd):
        labels = torch.cat(recovery_batches(classes, count, method.batch_size))
    else:
        labels = torch.arange(classes).repeat_interleave(count)
    return pixel_set(torch.cat(made), labels, classes, norm.mean, norm.std)


def _view_labels(
    teachers: Sequence[nn.Module],
    images: Tensor,
    labels: Tensor,
    method: DecoupledMethod,
    protocol: Protocol,
) -> Tensor:
    recipe = protocol.recipe
    epochs = min(method.label_epochs or recipe.epochs, recipe.epochs)
    if getattr(method, "labels", None) == "distances":
        return distance_labels(
            teachers,
            images,
            labels,
            recipe.views,
            batch_size=recipe.batch_size,
            seed=LABEL_SEED,
            num_epochs=epochs,
        )
    return relabel(
        teachers,
        images,
        recipe.views,
        batch_size=recipe.batch_size,
        seed=LABEL_SEED,
        num_epochs=epochs,
    )
