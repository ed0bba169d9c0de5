"""What in a store is referred to, by what, and what nothing needs any more.

Everything is named by a fingerprint, 64 hexadecimal digits, and whatever refers to it spells that
name out. So a reference is any fingerprint in the text of a JSON object, and the walk from the
roots (results of finished runs, pins, published names) through manifests and receipts needs to
know nothing of their fields: it may keep too much, never too little.
"""

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

from stillhouse.storage.filesystem import filesystem, join, read_many
from stillhouse.storage.layout import MANIFEST, PART_LIST, folder_about
from stillhouse.storage.parquet import parse_table
from stillhouse.storage.retries import with_retries

KINDS = (
    "images",
    "scans",
    "dead_letters",
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
)
_NAME = re.compile(r"[0-9a-f]{64}")
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp$")
_THREADS = 16


@dataclass(frozen=True, slots=True)
class StoredObject:
    """One object of a store: `path` is relative to it, `modified` in seconds since 1970."""

    path: str
    num_bytes: int
    modified: float

    @property
    def kind(self) -> str:
        """The folder of the store that it lies in; its own name at the top."""
        return self.path.split("/", 1)[0]

    @property
    def is_temporary(self) -> bool:
        """Whether it is what a writer left behind before the name was given."""
        return _TEMPORARY.search(self.path) is not None

    @property
    def is_root(self) -> bool:
        """Whether what it refers to is kept: a finished run's result, a pin, a published name."""
        in_run = self.kind == "runs" and self.path.endswith("/result.json")
        return not self.is_temporary and (in_run or self.kind in {"pins", "names"})

    @property
    def names(self) -> list[str]:
        """The fingerprints in its path; any of them keeps it."""
        return _NAME.findall(self.path)

    @property
    def label(self) -> str:
        """How it is called where it refers to something: `runs/0123...`, `names/web`."""
        folder, _, file = self.path.rpartition("/")
        return folder_about(folder) if folder else file


def list_objects(store: str) -> list[StoredObject]:
    """Every object under a store's URI, sorted by path: one listing; empty if there is none."""
    fs, root = filesystem(store)
    try:
        found = with_retries(lambda: fs.find(root, detail=True), f"listing {store}")
    except FileNotFoundError:
        return []
    start = len(root.rstrip("/")) + 1
    files = [(path[start:], detail) for path, detail in sorted(found.items())]
    return [StoredObject(p, int(d["size"]), _modified(d)) for p, d in files if d["type"] == "file"]


def _modified(detail: dict[str, Any]) -> float:
    """Filesystems that tell no time make their objects look new: nothing of theirs is removed."""
    for key in ("LastModified", "mtime", "last_modified", "created"):
        value = detail.get(key)
        if isinstance(value, datetime):
            return value.timestamp()
        if value is not None:
            return float(value)
    return float("inf")


def references(store: str, objects: Sequence[StoredObject]) -> dict[str, set[str]]:
    """Walk from the roots; every fingerprint that is reached, with the labels that name it.

    Args:
        store: its URI.
        objects: what `list_objects` found.
    """
    reached: dict[str, set[str]] = defaultdict(set)
    roots = [item for item in objects if item.is_root]
    for item, data in walk(store, objects, roots):
        for name in _mentioned(item, data) - set(item.names):
            reached[name].add(item.label)
    return dict(reached)


def walk(
    store: str, objects: Sequence[StoredObject], roots: Iterable[StoredObject]
) -> Iterator[tuple[StoredObject, bytes]]:
    """Every manifest, receipt and list of parts that is reached from `roots`, and these, with its
    bytes: each is read once, many at a time.
    """
    speaking: dict[str, list[StoredObject]] = defaultdict(list)
    for item in objects:
        if item.kind in KINDS and item.path.endswith((".json", f"/{PART_LIST}")):
            for name in item.names:
                speaking[name].append(item)
    pending = list(roots)
    read = {item.path for item in pending}
    while pending:
        found: set[str] = set()
        for item, data in zip(pending, _read(store, pending), strict=True):
            found |= _mentioned(item, data) - set(item.names)
            yield item, data
        pending = [item for name in sorted(found) for item in speaking.get(name, ())]
        pending = [item for item in dict.fromkeys(pending) if item.path not in read]
        read |= {item.path for item in pending}


def _read(store: str, items: Iterable[StoredObject]) -> list[bytes]:
    return read_many([join(store, item.path) for item in items])


def _mentioned(item: StoredObject, data: bytes) -> set[str]:
    """Fingerprints in the text of an object; of a long manifest's list, those in its paths."""
    if item.path.endswith(".parquet"):
        paths = parse_table(data, ["path"])["path"].to_pylist()
        return {name for path in paths for name in _NAME.findall(path)}
    return set(_NAME.findall(data.decode("utf-8", "replace")))


def unreachable(
    objects: Sequence[StoredObject], reached: Iterable[str], older_than: float
) -> list[StoredObject]:
    """What may go: objects of known kinds that nothing names, and temporaries of dead writers.

    Never anything modified at or after `older_than` (seconds since 1970): a writer that is at
    work creates a part before its receipt, and a receipt before the manifest.

    Returns:
        In the order of removal: manifests, then receipts, then the rest, so that whoever looks
        in between sees an artifact whole, or a task as not done.
    """
    kept = set(reached)
    gone = [
        item
        for item in objects
        if item.modified < older_than
        and (item.is_temporary or (item.kind in KINDS and item.names and not kept & {*item.names}))
    ]
    return sorted(gone, key=lambda item: (_rank(item), item.path))


def _rank(item: StoredObject) -> int:
    if item.path.endswith(f"/{MANIFEST}"):
        return 0
    return 1 if "/receipts/" in item.path else 2


def remove(store: str, items: Sequence[StoredObject], until: float) -> list[StoredObject]:
    """Delete objects, several at a time; one that is gone already is no error.

    Returns:
        Those whose removal began before `until` (of `time.monotonic`): the first ones.

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
