"""One expert, or one teacher, as a task: train it on the prepared images and keep it in the store.

An expert is the artifact `trajectories/<fingerprint>` (one file, `trajectory_file`), a teacher the
artifact `models/<fingerprint>` (`weights.safetensors`). Each is committed by itself, so that a
killed run redoes only those in flight.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from stillhouse.distillation.experts import ExpertOptions, train_expert
from stillhouse.distillation.functional import FlatModule
from stillhouse.distillation.labels import frozen
from stillhouse.distillation.prepared import Prepared
from stillhouse.distillation.settings import Recipe
from stillhouse.distillation.spec import NetworkSettings
from stillhouse.distillation.sre2l import require_batch_norm, squeeze
from stillhouse.distillation.trajectory_file import (
    StoredDtype,
    Trajectory,
    encode_trajectory,
    open_trajectory,
)
from stillhouse.errors import ArtifactError
from stillhouse.fingerprint import sha256
from stillhouse.models.networks import state_tensors
from stillhouse.storage.artifact import Manifest, PartRef, Receipt, Store
from stillhouse.storage.commit import create_or_adopt
from stillhouse.storage.filesystem import join, read_bytes
from stillhouse.storage.folders import local_folder, put_folder

KIND = "trajectories"
FILE = "trajectory.bin"
WEIGHTS = "weights.safetensors"


@dataclass(frozen=True, slots=True)
class ExpertTask:
    """An expert to train; `keep` are the epochs to store."""

    fingerprint: str
    network: NetworkSettings
    options: ExpertOptions
    keep: tuple[int, ...]
    stored_as: StoredDtype
    seed: int


def run_expert(store: Store, prepared: Prepared, task: ExpertTask) -> Receipt:
    """Train the expert of a task, commit its trajectory, then its receipt.

    Raises:
        DivergedError: its loss is NaN or infinite.
    """
    started = perf_counter()
    network = prepared.flat(task.network, task.seed)
    generator = torch.Generator().manual_seed(task.seed)
    kept: dict[int, Tensor] = {}
    losses: list[float] = []
    for snapshot in train_expert(
        network, prepared.train, prepared.train_labels, task.options, generator
    ):
        if snapshot.epoch in task.keep:
            kept[snapshot.epoch] = snapshot.parameters.clone()
        if snapshot.loss is not None:
            losses.append(snapshot.loss)
        if snapshot.epoch >= task.keep[-1]:
            break
    data = encode_trajectory(network, kept, task.stored_as)
    path = f"{KIND}/{task.fingerprint}/{FILE}"
    stands = create_or_adopt(store.path(path), data)
    seconds = perf_counter() - started
    totals = {"epochs": sorted(kept), "losses": losses, "bytes": len(stands)}
    store.put_manifest(
        Manifest(
            KIND,
            task.fingerprint,
            (),
            {"images": prepared.source},
            {
                "network": task.network.model_dump(),
                "seed": task.seed,
                "zca": prepared.zca is not None,
            },
            totals,
            files={FILE: sha256(stands)},
        )
    )
    counts = {"images": len(prepared.train) * len(losses), "bytes": len(stands)}
    info: dict[str, Any] = {"losses": losses, "seconds": seconds}
    part = _file_part(path, stands, len(kept))
    return store.put_receipt(KIND, Receipt(task.fingerprint, (part,), counts, info))


def _file_part(path: str, data: bytes, num_rows: int) -> PartRef:
    """A file as its receipt names it: where it was deleted, the task is one to do again."""
    return PartRef(path, num_rows, 0, len(data), sha256(data))


class Trajectories:
    """Experts' trajectories by URI, mapped from local disk (remote ones are copied there once)."""

    def __init__(self, uris: Sequence[str], network: FlatModule) -> None:
        self._open = ExitStack()
        self._found = [self._map(uri, network) for uri in uris]

    def __enter__(self) -> list[Trajectory]:
        return self._found

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _map(self, uri: str, network: FlatModule) -> Trajectory:
        folder = Path(self._open.enter_context(local_folder(uri, (FILE,))))
        if not (folder / FILE).exists():
            raise ArtifactError(f"{uri} holds no {FILE}: it is no expert's trajectory")
        return open_trajectory(folder / FILE, network, join(uri, FILE))


@dataclass(frozen=True, slots=True)
class TeacherTask:
    """A teacher to train."""

    fingerprint: str
    network: NetworkSettings
    recipe: Recipe
    seed: int


def run_teacher(store: Store, prepared: Prepared, task: TeacherTask) -> Receipt:
    """Train the teacher of a task, commit its weights, then its receipt.

    Raises:
        ModelError: it has no batch norm. DivergedError: its loss is NaN or infinite.
    """
    started = perf_counter()
    network = prepared.network(task.network, task.seed)
    require_batch_norm(network, f"the teacher {task.network.label}")
    images, labels = prepared.train, prepared.train_labels
    losses = squeeze(network, images, labels, task.recipe, seed=task.seed)

    weights = save(state_tensors(network))
    put_folder(
        store,
        task.fingerprint,
        lambda folder: (folder / WEIGHTS).write_bytes(weights),
        inputs={},
        settings={"network": task.network.model_dump(), "seed": task.seed},
        totals={"role": "teacher", "losses": losses},
    )
    info: dict[str, Any] = {"losses": losses, "seconds": perf_counter() - started}
    counts = {"images": len(images) * len(losses)}
    stands = read_bytes(store.path("models", task.fingerprint, WEIGHTS))
    part = _file_part(f"models/{task.fingerprint}/{WEIGHTS}", stands, 1)
    return store.put_receipt("models", Receipt(task.fingerprint, (part,), counts, info))


def load_teacher(
    store: Store, prepared: Prepared, settings: NetworkSettings, name: str
) -> nn.Module:
    """A stored teacher, frozen, on the device.

    Raises:
        ArtifactError: its weights are missing.
    """
    network = prepared.network(settings, 0)
    uri = store.path("models", name, WEIGHTS)
    try:
        weights = load(read_bytes(uri))
    except FileNotFoundError as error:
        raise ArtifactError(f"{uri} is missing, the weights of a teacher") from error
    network.load_state_dict(weights)
    return frozen(network.to(prepared.device))
