"""A training's state, its checkpoints in the store, and the loop that resumes from them (`fit`).

`checkpoints/<name>/<step>/` holds weights and moments as safetensors (`model-*`, `optimizer-*`),
the rest as JSON (`progress-*`), each file named by its content, and a manifest of them all,
written last. A writer that dies leaves files that nobody reads; another writer of the same step
cannot mix its files with them, and earlier checkpoints stay as they were.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Protocol, TypeVar

import torch
from safetensors.torch import load, save
from torch import Tensor

from stillhouse.errors import ArtifactError
from stillhouse.fingerprint import canonical_json, sha256
from stillhouse.storage.artifact import Manifest, Store
from stillhouse.storage.commit import create
from stillhouse.storage.filesystem import filesystem, list_names, read_bytes
from stillhouse.storage.layout import MANIFEST
from stillhouse.storage.retries import with_retries
from stillhouse.training.group import WorkerGroup, like, whole
from stillhouse.training.task import CHECKPOINTS

WEIGHT, MOMENT = "model.", "optimizer."
_SHARD_BYTES = 1 << 30

RecordT = TypeVar("RecordT")
RecordT_co = TypeVar("RecordT_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of a training between two steps, in copies on the CPU.

    Attributes:
        tensors: `model.<parameter or buffer>` and `optimizer.<moment>.<parameter>`, unsharded;
            shared weights once.
        progress: JSON values; `step` counts the steps done.
    """

    tensors: dict[str, Tensor]
    progress: dict[str, Any]


def take_snapshot(
    state: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    progress: dict[str, Any],
    *,
    keep: bool = True,
) -> Snapshot:
    """Copy the state; workers of a sharded training call this together.

    Args:
        keep: False for a worker that only helps to gather the tensors.
    """
    tensors: dict[str, Tensor] = {}

    def put(name: str, tensor: Tensor) -> None:
        full = whole(tensor.detach())
        if keep:
            tensors[name] = full.to("cpu", copy=True).contiguous()

    for name, tensor in state.items():
        put(WEIGHT + name, tensor)
        for key, value in optimizer.state.get(tensor, {}).items():
            put(f"{MOMENT}{key}.{name}", torch.as_tensor(value))  # Adafactor's step is an int
    return Snapshot(tensors, progress)


def put_snapshot(
    snapshot: Snapshot, state: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Restore weights, buffers and moments, sharded where the parameters are."""
    for name, tensor in state.items():
        with torch.no_grad():
            tensor.copy_(like(snapshot.tensors[WEIGHT + name], tensor))
    put_moments(snapshot.tensors, state, optimizer)


def put_moments(
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Restore the moments among a snapshot's tensors, sharded where the parameters are."""
    optimizer.state.clear()
    for full_name, tensor in tensors.items():
        if full_name.startswith(MOMENT):
            key, name = full_name.removeprefix(MOMENT).split(".", 1)
            optimizer.state[parameters[name]][key] = like(tensor, parameters[name]).clone()


class _BrokenError(ArtifactError):
    """An incomplete or damaged checkpoint."""


class Checkpoints:
    """The checkpoints of one training. One worker writes them; any may load.

    Args:
        store: where they are.
        name: fingerprint of the training, which its state depends on.
        keep_last: how many of the newest are kept, beside the best one.
    """

    def __init__(self, store: Store, name: str, *, keep_last: int = 2) -> None:
        self._store, self._name, self._keep_last = store, name, keep_last
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except Exception:
            if error is None:
                raise
        finally:
            self._thread.shutdown()

    def save(self, snapshot: Snapshot, score: float | None = None) -> None:
        """Write a snapshot in the background, once the previous one is written.

        Args:
            score: the held-out loss at this step, if it was measured; the lowest is the best.

        Raises:
            StorageError: the previous write failed.
        """
        self.wait()
        self._writing = self._thread.submit(self._write, snapshot, score)

    def wait(self) -> None:
        """Wait until the last snapshot is committed.

        Raises:
            StorageError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, ascending."""
        return sorted(self._scores())

    def load_newest(self, until: int | None = None) -> Snapshot | None:
        """The newest complete checkpoint, or None. Broken ones are removed, so that the training
        can write them again.

        Args:
            until: the last step to consider; later checkpoints are removed too.
        """
        for step in reversed(self._folders()):
            if until is not None and step > until:
                self._remove(step)
                continue
            try:
                if self._manifest(step) is not None:
                    return self.load(step)
            except _BrokenError:
                self._remove(step)
        return None

    def load(self, step: int) -> Snapshot:
        """The checkpoint of a step.

        Raises:
            ArtifactError: missing or damaged.
        """
        manifest = self._manifest(step)
        if manifest is None:
            raise ArtifactError(f"no checkpoint at {self._uri(step)}")
        tensors: dict[str, Tensor] = {}
        progress: dict[str, Any] = {}
        for name, digest in manifest.files.items():
            uri = f"{self._uri(step)}/{name}"
            try:
                data = read_bytes(uri)
            except FileNotFoundError as error:
                raise _BrokenError(f"{uri} is missing") from error
            if sha256(data) != digest:
                raise _BrokenError(f"{uri} is not what was written")
            if name.endswith(".json"):
                progress = json.loads(data)
            else:
                tensors |= load(data)
        return Snapshot(tensors, progress)

    def remove_all(self) -> None:
        """Remove every checkpoint; the list of starts stays."""
        for step in self._folders():
            self._remove(step)

    def _write(self, snapshot: Snapshot, score: float | None) -> None:
        step = int(snapshot.progress["step"])
        files: dict[str, str] = {}
        for stem, data in _files(snapshot):
            digest = sha256(data)
            suffix = "json" if stem == "progress" else "safetensors"
            name = f"{stem}-{digest[:16]}.{suffix}"
            create(f"{self._uri(step)}/{name}", data)
            files[name] = digest
        self._store.put_manifest(
            Manifest(
                kind=CHECKPOINTS,
                fingerprint=f"{self._name}/{step:08d}",
                parts=(),
                inputs={},
                settings={},
                totals={"step": step, "score": score},
                files=files,
            )
        )
        self._prune(step)

    def _prune(self, newest: int) -> None:
        """Remove all before `newest` but the last and the best, and what dead writers left."""
        scores = {step: score for step, score in self._scores().items() if step <= newest}
        kept = set(sorted(scores)[-self._keep_last :])
        measured = [(score, -step) for step, score in scores.items() if score is not None]
        if measured:
            kept.add(-min(measured)[1])
        for step in self._folders():
            if step < newest and step not in kept:
                self._remove(step)

    def _scores(self) -> dict[int, float | None]:
        scores: dict[int, float | None] = {}
        for step in self._folders():
            with suppress(_BrokenError):
                manifest = self._manifest(step)
                if manifest is not None:
                    scores[step] = manifest.totals["score"]
        return scores

    def _remove(self, step: int) -> None:
        """Manifest first: a reader sees a checkpoint whole, or none."""
        fs, path = filesystem(self._uri(step))
        for name, recursive in ((f"{path}/{MANIFEST}", False), (path, True)):
            with suppress(FileNotFoundError):
                with_retries(partial(fs.rm, name, recursive=recursive), f"removing {name}")

    def _folders(self) -> list[int]:
        names = list_names(self._store.path(CHECKPOINTS, self._name))
        return sorted(int(name) for name in names if name.isdigit())

    def _manifest(self, step: int) -> Manifest | None:
        try:
            found = self._store.find_manifest(CHECKPOINTS, f"{self._name}/{step:08d}")
        except ArtifactError as error:
            raise _BrokenError(str(error)) from error
        if found is None and MANIFEST in list_names(self._uri(step)):
            raise _BrokenError(f"{self._uri(step)} has lost a file")
        return found

    def _uri(self, step: int) -> str:
        return self._store.path(CHECKPOINTS, self._name, f"{step:08d}")


def newest_moments(store: Store, name: str) -> dict[str, Tensor]:
    """The optimiser's moments in the newest checkpoint of a training.

    Raises:
        ArtifactError: its checkpoints are gone.
    """
    checkpoints = Checkpoints(store, name)
    steps = checkpoints.steps()
    if not steps:
        raise ArtifactError(
            f"no checkpoint at {store.path(CHECKPOINTS, name)}: the optimiser's moments are gone "
            "(`init.optimizer: fresh`)"
        )
    tensors = checkpoints.load(steps[-1]).tensors
    return {name: value for name, value in tensors.items() if name.startswith(MOMENT)}


def _files(snapshot: Snapshot) -> Iterator[tuple[str, bytes]]:
    """Name stem and bytes of each file, of at most about a gigabyte, one at a time."""
    for kind, prefix in (("model", WEIGHT), ("optimizer", MOMENT)):
        shards: list[dict[str, Tensor]] = []
        num_bytes = 0
        for name, tensor in snapshot.tensors.items():
            if name.startswith(prefix):
                if not shards or num_bytes + tensor.nbytes > _SHARD_BYTES:
                    shards.append({})
                    num_bytes = 0
                shards[-1][name] = tensor
                num_bytes += tensor.nbytes
        for i, shard in enumerate(shards):
            yield f"{kind}-{i:05d}", save(shard)
    yield "progress", canonical_json(snapshot.progress)


class Resumable(Protocol[RecordT_co]):
    """What `fit` trains: a `Trainer`, or anything else that advances in steps."""

    def step(self) -> RecordT_co:
        """Do one step; returns what `on_step` is given."""
        ...

    def snapshot(self) -> Snapshot: ...

    def restore(self, snapshot: Snapshot) -> None: ...


class Stateful(Protocol):
    """Something that advances with a training and is kept in its checkpoints, as JSON values."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def fit(
    trainer: Resumable[RecordT],
    checkpoints: Checkpoints,
    group: WorkerGroup,
    *,
    num_steps: int,
    checkpoint_every: int,
    on_step: Callable[[RecordT], float | None],
    on_start: Callable[[int], None] | None = None,
    beside: Mapping[str, Stateful] | None = None,
    until: int | None = None,
    stopped: Callable[[], bool] | None = None,
) -> int:
    """Train up to `num_steps`, from the newest checkpoint; all workers call this.

    A worker that dies, or an error, leaves what was committed; the next call continues from there,
    with any number of workers. The first worker writes the checkpoints.

    Args:
        trainer: fresh; its state is replaced if there is a checkpoint.
        num_steps: of the whole training.
        checkpoint_every: steps; the last step is always kept.
        on_step: called on every worker after every step; returns the held-out loss, if measured.
        on_start: called on every worker with the step to continue from, before the first step.
        beside: further state by name; the first worker's is kept.
        until: as `Checkpoints.load_newest`; only the first worker's value counts.
        stopped: asked before every step, with the same answer on all workers: ends the training,
            which has to be at a checkpoint.

    Returns:
        The step of the checkpoint that it continued from, or 0.

    Raises:
        DivergedError: as `trainer.step`. StorageError: a checkpoint could not be written.
    """
    snapshot = checkpoints.load_newest(until) if group.rank == 0 else None
    start = group.gather(0 if snapshot is None else snapshot.progress["step"])[0]
    if start:
        snapshot = snapshot or checkpoints.load(start)
        trainer.restore(snapshot)
        for name, part in (beside or {}).items():
            part.load_state_dict(snapshot.progress["beside"][name])
    if on_start is not None:
        on_start(start)
    with checkpoints:
        for step in range(start + 1, num_steps + 1):
            if stopped is not None and stopped():
                break
            score = on_step(trainer.step())
            if step % checkpoint_every == 0 or step == num_steps:
                snapshot = trainer.snapshot()
                if group.rank == 0:
                    states = {name: part.state_dict() for name, part in (beside or {}).items()}
                    snapshot.progress["beside"] = states
                    checkpoints.save(snapshot, score)
    return start
