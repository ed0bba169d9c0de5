"""Which objects of a store are referred to, by what, and which may be pruned.

Everything is named by a fingerprint, 64 hexadecimal digits, and whatever refers to it spells that
name out. So a reference is any fingerprint in the text of a JSON object, and the walk from the
roots (results of finished runs, pins, published names) through manifests and receipts needs no
knowledge of their fields: it may keep too much, never too little.

A prune and a starting run exclude each other: each first writes what it does and then looks for the
other, so that at least one of them sees the other. A prune writes `pruning.json`, then looks for
live runs, batch by batch; a run writes its status, then waits until no prune is announced, before
it relies on anything that it found.
"""

import json
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

from stillhouse.storage.commit import replace
from stillhouse.storage.filesystem import filesystem, join, read_bytes, read_many
from stillhouse.storage.layout import MANIFEST, PART_LIST, folder_about
from stillhouse.storage.parquet import parse_table
from stillhouse.storage.retries import with_retries

KINDS = (
    "images",
    "scans",
    "dead_letters",
    "hashes",
    "drops",
    "tokens",
    "scores",
    "ranks",
    "selections",
    "models",
    "trajectories",
    "distilled",
    "checkpoints",
    "arms",
    "signals",
    "evaluations",
    "drafts",
    "generated",
)
_NAME = re.compile(r"[0-9a-f]{64}")
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp$")
_THREADS = 16
_PRUNING = "pruning.json"
LEASE_S = 300.0
"""How long an announced prune holds: longer than a batch of removals, and than clocks differ."""
_POLL_S = 1.0


@dataclass(frozen=True, slots=True)
class StoredObject:
    """One object of a store: `path` is relative to it, `modified` in seconds since 1970."""

    path: str
    num_bytes: int
    modified: float

    @property
    def kind(self) -> str:
        """The top folder of the store that it lies in; its own name at the top."""
        return self.path.split("/", 1)[0]

    @property
    def is_temporary(self) -> bool:
        """Whether a writer left it behind before it got its name."""
        return _TEMPORARY.search(self.path) is not None

    @property
    def is_root(self) -> bool:
        """Whether it keeps what it refers to: a finished run's result, a pin, a published name."""
        in_run = self.kind == "runs" and self.path.endswith("/result.json")
        return not self.is_temporary and (in_run or self.kind in {"pins", "names"})

    @property
    def names(self) -> list[str]:
        """The fingerprints in its path; a reference to any of them keeps it."""
        return _NAME.findall(self.path)

    @property
    def label(self) -> str:
        """Its name as the origin of a reference: `runs/0123...`, `names/web`."""
        folder, _, file = self.path.rpartition("/")
        return folder_about(folder) if folder else file


def list_objects(store: str) -> list[StoredObject]:
    """Every object under a store's URI, sorted by path, by one listing."""
    fs, root = filesystem(store)
    try:
        found = with_retries(lambda: fs.find(root, detail=True), f"listing {store}")
    except FileNotFoundError:
        return []
    start = len(root.rstrip("/")) + 1
    files = [(path[start:], detail) for path, detail in sorted(found.items())]
    return [StoredObject(p, int(d["size"]), _modified(d)) for p, d in files if d["type"] == "file"]


def _modified(detail: dict[str, Any]) -> float:
    """Infinite where the filesystem tells no time, so that nothing there is removed."""
    for key in ("LastModified", "mtime", "last_modified", "created"):
        value = detail.get(key)
        if isinstance(value, datetime):
            return value.timestamp()
        if value is not None:
            return float(value)
    return float("inf")


def references(store: str, objects: Sequence[StoredObject]) -> dict[str, set[str]]:
    """Every fingerprint that is reached from the roots, with the labels of what refers to it."""
    reached: dict[str, set[str]] = defaultdict(set)
    roots = [item for item in objects if item.is_root]
    for item, data in walk(store, objects, roots):
        for name in _mentioned(item, data) - set(item.names):
            reached[name].add(item.label)
    return dict(reached)


def walk(
    store: str, objects: Sequence[StoredObject], roots: Iterable[StoredObject]
) -> Iterator[tuple[StoredObject, bytes]]:
    """The roots, and every manifest, receipt and list of parts that is reached from them, each with
    its bytes. Each is read once, many at a time.
    """
    referring: dict[str, list[StoredObject]] = defaultdict(list)
    for item in objects:
        if item.kind in KINDS and item.path.endswith((".json", f"/{PART_LIST}")):
            for name in item.names:
                referring[name].append(item)
    pending = list(roots)
    read = {item.path for item in pending}
    while pending:
        found: set[str] = set()
        for item, data in zip(pending, read_objects(store, pending), strict=True):
            found |= _mentioned(item, data) - set(item.names)
            yield item, data
        pending = [item for name in sorted(found) for item in referring.get(name, ())]
        pending = [item for item in dict.fromkeys(pending) if item.path not in read]
        read |= {item.path for item in pending}


def read_objects(store: str, items: Iterable[StoredObject]) -> list[bytes]:
    return read_many([join(store, item.path) for item in items])


def _mentioned(item: StoredObject, data: bytes) -> set[str]:
    """The fingerprints in the text of an object, or in the paths of a Parquet list of parts."""
    if item.path.endswith(".parquet"):
        paths = parse_table(data, ["path"])["path"].to_pylist()
        return {name for path in paths for name in _NAME.findall(path)}
    return set(_NAME.findall(data.decode("utf-8", "replace")))


def unreachable(
    objects: Sequence[StoredObject], reached: Iterable[str], older_than: float
) -> list[StoredObject]:
    """Objects of known kinds that nothing refers to, and temporaries of dead writers.

    Never anything modified at or after `older_than` (seconds since 1970): a writer at work creates
    a part before its receipt, and a receipt before the manifest.

    Returns:
        In the order of removal: manifests, then receipts, then the rest, so that a reader in
        between sees an artifact whole, or a task as not done.
    """
    kept = set(reached)

    def is_unused(item: StoredObject) -> bool:
        named = item.kind in KINDS and bool(item.names)
        return item.is_temporary or (named and kept.isdisjoint(item.names))

    unused = [item for item in objects if item.modified < older_than and is_unused(item)]

    def order(item: StoredObject) -> tuple[bool, bool, str]:
        return not item.path.endswith(f"/{MANIFEST}"), "/receipts/" not in item.path, item.path

    return sorted(unused, key=order)


def remove(store: str, items: Sequence[StoredObject], until: float) -> list[StoredObject]:
    """Delete objects, several at a time; one that is gone already is not an error.

    Returns:
        The objects whose removal began before `until` (of `time.monotonic`): the first ones.

    Raises:
        StorageError: no permission, or the store cannot be reached.
    """
    with ThreadPoolExecutor(_THREADS) as threads:
        began = list(threads.map(partial(_remove, store, until), items))
    return [item for item, done in zip(items, began, strict=True) if done]


def _remove(store: str, until: float, item: StoredObject) -> bool:
    if time.monotonic() >= until:
        return False
    uri = join(store, item.path)
    fs, path = filesystem(uri)
    with suppress(FileNotFoundError):
        with_retries(lambda: fs.rm_file(path), f"removing {uri}")
    return True


def announce_prune(store: str) -> None:
    """Announce that objects may be removed during the next `LEASE_S`."""
    page = {"until": time.time() + LEASE_S}
    replace(join(store, _PRUNING), json.dumps(page).encode())


def end_prune(store: str) -> None:
    fs, path = filesystem(join(store, _PRUNING))
    with suppress(FileNotFoundError):
        fs.rm_file(path)


def is_pruned(store: str) -> bool:
    """Whether a prune is announced; a dead one counts until its lease ends."""
    try:
        page = json.loads(read_bytes(join(store, _PRUNING)))
    except FileNotFoundError:
        return False
    return float(page["until"]) > time.time()


def wait_for_prune(store: str) -> None:
    """Return when no prune is announced."""
    while is_pruned(store):
        time.sleep(_POLL_S)
