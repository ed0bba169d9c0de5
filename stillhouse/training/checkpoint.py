"""Checkpoints of a training in the store, written in the background while it goes on.

`checkpoints/<name>/<step>/`: weights and moments as safetensors (`model-*`, `optimizer-*`), the
rest as JSON (`progress-*`), each file named by its content, and the manifest that names them all,
created last. So a writer that dies leaves files that nobody sees, another that comes to the same
step cannot mix its files with them, and every earlier checkpoint stays as it was.
"""

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from stillhouse.errors import ArtifactError
from stillhouse.fingerprint import canonical_json, sha256
from stillhouse.storage.artifact import Manifest, Store
from stillhouse.storage.commit import create
from stillhouse.storage.filesystem import filesystem, list_names, read_bytes
from stillhouse.storage.layout import MANIFEST
from stillhouse.storage.retries import with_retries
from stillhouse.training.state import MOMENT, WEIGHT, Snapshot
from stillhouse.training.task import CHECKPOINTS

_SHARD_BYTES = 1 << 30
_PREFIXES = {"model": WEIGHT, "optimizer": MOMENT}


@dataclass(frozen=True, slots=True)
class Loaded:
    """A checkpoint that was found: its step, the state, and broken newer ones, newest first."""

    step: int
    snapshot: Snapshot
    broken: tuple[str, ...]


class Checkpoints:
    """The checkpoints of one training. One worker writes them; any may load.

    Args:
        store: where they lie.
        name: fingerprint of the training.
        identity: what has to be the same to go on from one: JSON values, nested by sections.
        keep_last: how many of the newest are kept; the best one is kept beside them.
    """

    def __init__(
        self, store: Store, name: str, identity: Mapping[str, Any], *, keep_last: int = 2
    ) -> None:
        self._store, self._name, self._keep_last = store, name, keep_last
        self._identity: dict[str, Any] = json.loads(canonical_json(dict(identity)))
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """The write under way is finished; its failure is raised if nothing else was."""
        try:
            self.wait()
        except Exception:
            if error is None:
                raise
        finally:
            self._thread.shutdown()

    def save(self, snapshot: Snapshot, score: float | None = None) -> None:
        """Write a snapshot in the background, after the one before it.

        Args:
            snapshot: of `Trainer.snapshot`.
            score: the held-out loss at this step, if it was measured; the lowest is the best.

        Raises:
            StorageError: the write before it failed.
        """
        self.wait()
        self._writing = self._thread.submit(self._write, snapshot, score)

    def wait(self) -> None:
        """Until the last save is committed.

        Raises:
            StorageError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, ascending."""
        return sorted(self._scores())

    def load_newest(self, until: int | None = None) -> Loaded | None:
        """The newest checkpoint that is whole, or None. Broken ones are passed over and removed,
        so that the training can write them again.

        Args:
            until: no step after this one; later checkpoints are removed too.

        Raises:
            ArtifactError: it is of a training with another identity; names the first key.
        """
        broken: list[str] = []
        for step in reversed(self._folders()):
            if until is not None and step > until:
                self._remove(step)
                continue
            try:
                if self._manifest(step) is not None:
                    return Loaded(step, self.load(step).snapshot, tuple(broken))
            except _BrokenError as error:
                broken.append(str(error))
                self._remove(step)
        return None

    def load(self, step: int) -> Loaded:
        """The checkpoint of a step.

        Raises:
            ArtifactError: not there, not whole, or of a training with another identity.
        """
        manifest = self._manifest(step)
        if manifest is None:
            raise ArtifactError(f"no checkpoint at {self._uri(step)}")
        check_same(manifest.settings, self._identity, self._uri(step))
        return Loaded(step, self._read(step, manifest), ())

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
                settings=self._identity,
                totals={"step": step, "score": score},
                files=files,
            )
        )
        self._prune(step)

    def _read(self, step: int, manifest: Manifest) -> Snapshot:
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

    def _prune(self, newest: int) -> None:
        """Remove all before `newest` but the last ones and the best, dead writers' files too."""
        scores = {step: score for step, score in self._scores().items() if step <= newest}
        kept = set(sorted(scores)[-self._keep_last :])
        measured = [(score, -step) for step, score in scores.items() if score is not None]
        if measured:
            kept.add(-min(measured)[1])
        for step in self._folders():
            if step < newest and step not in kept:
                self._remove(step)

    def _scores(self) -> dict[int, float | None]:
        """The committed checkpoints and how good they are."""
        scores: dict[int, float | None] = {}
        for step in self._folders():
            with suppress(_BrokenError):
                manifest = self._manifest(step)
                if manifest is not None:
                    scores[step] = manifest.totals["score"]
        return scores

    def _remove(self, step: int) -> None:
        """The manifest goes first: whoever looks sees a checkpoint whole, or none."""
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
    """The optimiser's moments in the newest checkpoint of a training, whatever it was.

    Raises:
        ArtifactError: it has none any more.
    """
    folders = list_names(store.path(CHECKPOINTS, name))
    for step in sorted((int(f) for f in folders if f.isdigit()), reverse=True):
        manifest = store.find_manifest(CHECKPOINTS, f"{name}/{step:08d}")
        if manifest is not None:
            there = Checkpoints(store, name, manifest.settings)
            tensors = there.load(step).snapshot.tensors
            return {name: value for name, value in tensors.items() if name.startswith(MOMENT)}
    raise ArtifactError(
        f"no checkpoint at {store.path(CHECKPOINTS, name)}: the optimiser's moments are gone "
        "(`init.optimizer: fresh`)"
    )


class _BrokenError(ArtifactError):
    """A checkpoint that is not whole."""


def _files(snapshot: Snapshot) -> Iterator[tuple[str, bytes]]:
    """Name stem and bytes of each file; one at a time, about a gigabyte each at most."""
    for kind, prefix in _PREFIXES.items():
        for i, tensors in enumerate(_shards(snapshot.tensors, prefix)):
            yield f"{kind}-{i:05d}", save(tensors)
    yield "progress", canonical_json(snapshot.progress)


def _shards(tensors: Mapping[str, Tensor], prefix: str) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    num_bytes = 0
    for name, tensor in tensors.items():
        if not name.startswith(prefix):
            continue
        if shard and num_bytes + tensor.nbytes > _SHARD_BYTES:
            yield shard
            shard, num_bytes = {}, 0
        shard[name] = tensor
        num_bytes += tensor.nbytes
    if shard:
        yield shard


def check_same(there: Mapping[str, Any], here: Mapping[str, Any], place: str) -> None:
    """Compare two identities, sections of keys and values.

    Raises:
        ArtifactError: naming the first key that differs, and both values.
    """
    first, second = _flat(there), _flat(here)
    for key in sorted(first.keys() | second.keys()):
        if first.get(key) != second.get(key):
            raise ArtifactError(
                f"{place} is of another training: `{key}` is {first.get(key)!r} there and "
                f"{second.get(key)!r} here"
            )


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {path: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():  # pyright: ignore[reportUnknownVariableType]
        found |= _flat(inner, f"{path}.{key}" if path else str(key))
    return found
