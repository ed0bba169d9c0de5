"""One evaluation as a task: a fresh network trained on a set, tested once on one part."""

from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Literal

import torch
from safetensors.torch import load
from torch import Tensor

from stillhouse.distillation.augment import augment, draw_augmentation
from stillhouse.distillation.evaluate import Protocol, accuracy
from stillhouse.distillation.fit import Augment, fit
from stillhouse.distillation.labels import (
    Objective,
    towards_classes,
    towards_static,
    towards_stored,
)
from stillhouse.distillation.nrr_dd import towards_distances
from stillhouse.distillation.prepared import Prepared
from stillhouse.distillation.settings import DistanceSettings, Group
from stillhouse.distillation.spec import NetworkSettings
from stillhouse.distillation.stored_sets import LabelledSet, read_set
from stillhouse.storage.artifact import Receipt, Store
from stillhouse.storage.filesystem import read_bytes
from stillhouse.storage.parquet import read_table

KIND = "distilled"
LABEL_SEED = 0
"""Of the views that stored labels are of; every evaluation sees the same ones."""


@dataclass(frozen=True, slots=True)
class SetSource:
    """What to train on.

    Attributes:
        path: of the set's part in the store; None for all real training images.
        label_path: of the labels of views in the store, or None.
        label_kind: what they are.
        distances: how a student learns from them.
    """

    path: str | None
    label_path: str | None = None
    label_kind: Literal["views", "distances"] | None = None
    distances: DistanceSettings = field(default_factory=DistanceSettings)


@dataclass(frozen=True, slots=True)
class EvaluationTask:
    """A network to train and test.

    Attributes:
        fingerprint: its receipt's name.
        source: what it is trained on.
        network: its architecture.
        protocol: recipe and temperature.
        augmentation: DSA groups; none: only the recipe's views.
        part: what it is tested on.
        seed: of its weights and order.
    """

    fingerprint: str
    source: SetSource
    network: NetworkSettings
    protocol: Protocol
    augmentation: tuple[Group, ...]
    part: Literal["validation", "test"]
    seed: int


def run_evaluation(store: Store, prepared: Prepared, task: EvaluationTask) -> Receipt:
    """Train and test; the accuracy is in the receipt's `info`.

    Raises:
        DivergedError: the training loss is NaN or infinite.
    """
    started = perf_counter()
    network = prepared.network(task.network, task.seed)
    recipe, stored = task.protocol.recipe, _stored_labels(store, task.source)
    if task.source.path is None:
        images, objective = prepared.train, towards_classes(prepared.train_labels)
    else:
        given = read_set(read_table(store.path(task.source.path)), task.source.path)
        images = given.images.to(prepared.device)
        objective = _objective(given, stored, task, prepared.device)
    losses = fit(
        network,
        images,
        objective,
        recipe,
        seed=LABEL_SEED if stored is not None else task.seed,
        augmentation=None if stored is not None else _siamese(prepared, task),
        stored_epochs=None if stored is None else len(stored),
    )
    tested = (
        (prepared.test, prepared.test_labels)
        if task.part == "test"
        else (prepared.validation, prepared.validation_labels)
    )
    info: dict[str, Any] = {
        "accuracy": accuracy(network, *tested),
        "loss": losses[-1],
        "seconds": perf_counter() - started,
    }
    counts = {"images": len(images) * recipe.epochs}
    return store.put_receipt(KIND, Receipt(task.fingerprint, (), counts, info))


def _siamese(prepared: Prepared, task: EvaluationTask) -> Augment | None:
    if not task.augmentation:
        return None
    generator = torch.Generator().manual_seed(task.seed)
    groups, side = task.augmentation, prepared.shape[1]

    def apply(images: Tensor) -> Tensor:
        return augment(images, draw_augmentation(groups, len(images), side, generator))

    return apply


def _stored_labels(store: Store, source: SetSource) -> Tensor | None:
    if source.label_path is None:
        return None
    return load(read_bytes(store.path(source.label_path)))["labels"]


def _objective(
    given: LabelledSet, stored: Tensor | None, task: EvaluationTask, device: torch.device
) -> Objective:
    """What the set's labels say."""
    labels, temperature = given.labels.to(device), task.protocol.temperature
    if stored is not None:
        if task.source.label_kind == "distances":
            return towards_distances(labels, stored.to(device), task.source.distances)
        return towards_stored(stored.to(device), temperature)
    if given.label_logits is not None:
        return towards_static(given.label_logits.to(device), temperature)
    return towards_classes(labels)
