"""Taking documents down: those that lists name by id, hash or URL, and every copy of their text.

A list becomes keys of 16 bytes: the hashes of texts themselves (`document_hash`), and of ids and
URLs the first bytes of SHA-256. Each scanned unit of the pool is searched once for the same lists
(`TakedownTask`); ids and URLs are read again from the raw files. It finds the hashes of texts, and
whatever has one of these hashes in the scans is taken down. So tokens, models and scores stay as
they are, and a copy that was dropped as a duplicate takes the copy that was packed along.
"""

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stillhouse.data_settings import ExcludeSettings
from stillhouse.errors import ArtifactError, InputError
from stillhouse.fingerprint import fingerprint, sha256
from stillhouse.selection.carried import raw_rows
from stillhouse.selection.scorers import load_arrays
from stillhouse.storage.artifact import Manifest, Receipt, Store
from stillhouse.storage.filesystem import FileInfo
from stillhouse.storage.parquet import read_table
from stillhouse.storage.task import Output, Place, Task
from stillhouse.text.duplicates import (
    DocumentTable,
    Hashes,
    binary_array,
    hash_array,
    read_scans,
)
from stillhouse.text.pieces import Grain
from stillhouse.text.records import read_records
from stillhouse.text.rows.record import Record
from stillhouse.text.tasks import ScanTask
from stillhouse.text.values import column_of, column_paths, find, key_paths, label
from stillhouse.training.seen import Ranges, Rows, add_rows, in_ranges, rows_with

COLUMNS = {"ids": "id", "hashes": "hash", "urls": "url"}
"""The kinds of lists, and the column of each in Parquet and JSON Lines."""
KINDS = tuple(COLUMNS)
FOUND_SCHEMA = pa.schema([("kind", pa.int8()), ("entry", pa.int64()), ("hash", pa.binary(16))])
_LINES = "\n"
"""The key of a plain text file's content."""
_MAX_CHARS = 2**30
_HASH = re.compile(r"[0-9a-fA-F]{32}")


@dataclass(frozen=True, slots=True)
class TakedownLists:
    """What is to be taken down: sorted, different keys by kind of list, and the column of URLs."""

    keys: Mapping[str, Hashes]
    url_column: str

    @property
    def digest(self) -> str:
        """Of the entries, whatever their order and the format of the files."""
        column = [self.url_column] if "urls" in self.keys else []
        return fingerprint([{k: sha256(v.tobytes()) for k, v in self.keys.items()}, column])


def read_lists(settings: ExcludeSettings, files: Mapping[str, Sequence[FileInfo]]) -> TakedownLists:
    """The entries of all lists; `files` by kind.

    Raises:
        InputError: no such column, a row without a value, a text that is no hash.
        BadFileError: a file that cannot be read.
    """
    keys: dict[str, Hashes] = {}
    for kind, found in files.items():
        values = (pair for file in found for pair in _values(kind, file.uri))
        keys[kind] = unique_keys(b"".join(_key(kind, value, where) for value, where in values))
    return TakedownLists(keys, settings.url_column)


def _values(kind: str, uri: str) -> Iterator[tuple[str, str]]:
    """The values of a list, and where each stands."""
    column = COLUMNS[kind]
    choose = partial(_chosen, uri, kind)
    for record in read_records(uri, choose, text=_LINES, max_chars=_MAX_CHARS):
        if _LINES in record.values:
            for number, line in enumerate(record.values[_LINES].splitlines(), 1):
                if line.strip():
                    yield line.strip(), f"{uri}, line {number}"
            continue
        where = f"{uri}, row {record.row}"
        value = _value(record, column, where)
        if not value:
            keys = ", ".join(key_paths(record.values))
            raise InputError(f"{where}: no `{column}` (`exclude.{kind}`); it has {keys}")
        yield value, where


def _value(record: Record, column: str, where: str) -> str:
    if record.broken:
        raise InputError(f"{where}: {record.broken}")
    value = find(record.values, column)
    if column == COLUMNS["hashes"] and isinstance(value, bytes) and len(value) == 16:
        return value.hex()
    try:
        return label(value).strip()
    except ValueError as error:
        raise InputError(f"{where}: `{column}` is {error}") from error


def _chosen(uri: str, kind: str, schema: pa.Schema) -> list[str]:
    column = COLUMNS[kind]
    if column_of(schema, column) is None:
        paths = column_paths(schema)
        near = get_close_matches(column, paths, n=1)
        hint = f"; rename `{near[0]}`" if near else ""
        raise InputError(
            f"{uri}: no column `{column}` (`exclude.{kind}`){hint}. It has {', '.join(paths)}"
        )
    return [column]


def _key(kind: str, value: str, where: str) -> bytes:
    if kind != "hashes":
        return _digest(value)
    if not _HASH.fullmatch(value):
        raise InputError(
            f"{where}: {value[:80]!r} is no hash of a text: 32 hexadecimal digits, as "
            "`stillhouse.text.duplicates.document_hash(text).hex()` gives (`exclude.hashes`)"
        )
    return bytes.fromhex(value)


def _digest(value: str) -> bytes:
    return hashlib.sha256(value.encode()).digest()[:16]


def unique_keys(keys: bytes | Hashes) -> Hashes:
    """The different ones of any number of keys of 16 bytes, in order."""
    array = _as_keys(keys) if isinstance(keys, bytes) else keys
    return np.unique(_whole(array)).view(np.uint8).reshape(-1, 16)


def _as_keys(keys: bytes) -> Hashes:
    return np.frombuffer(keys, np.uint8).reshape(-1, 16)


def entries_of(keys: Hashes, known: Hashes) -> NDArray[np.int64]:
    """The place of each key among some sorted ones, -1 where it is none of them: int64 [n]."""
    if not len(known):
        return np.full(len(keys), -1)
    at = np.searchsorted(_whole(known), _whole(keys)).clip(max=len(known) - 1)
    return np.where(_whole(known)[at] == _whole(keys), at, -1)


def _whole(keys: Hashes) -> NDArray[np.bytes_]:
    """Keys as values that compare: uint8 [n, 16] -> S16 [n]."""
    return np.ascontiguousarray(keys).view("S16").reshape(-1)


@dataclass(frozen=True, slots=True)
class ListsHost:
    """Workers that keep the lists loaded, arrays by kind in `folder`."""

    folder: str

    def build(self, store: Store) -> dict[str, Hashes]:
        return load_arrays(self.folder)


@dataclass(frozen=True)
class TakedownTask(Task):
    """Find what lists name in one scanned unit: entries, and the hash of the text of each.

    A unit in which nothing is found makes no part.

    Attributes:
        scan: the unit's hashes.
        lists: their digest.
        unit: the unit itself, where ids and URLs are read.
        url_column: of the pool.
    """

    KIND = "drops"

    scan: Receipt
    lists: str
    unit: Place[ScanTask]
    url_column: Place[str]

    def run(self, store: Store, host: Mapping[str, Hashes], loaded: Any) -> Output:
        scanned = read_scans(store, [self.scan])
        keys = {"hashes": scanned.hashes, **self._labels(scanned, host.keys() - {"hashes"})}
        found: list[pa.Table] = []
        for kind, known in sorted(host.items()):
            entry = entries_of(keys[kind], known)
            hit = np.flatnonzero(entry >= 0)
            columns = [
                pa.array(np.full(len(hit), KINDS.index(kind), np.int8)),
                pa.array(entry[hit]),
                binary_array(scanned.hashes[hit]),
            ]
            found.append(pa.Table.from_arrays(columns, schema=FOUND_SCHEMA))
        table = pa.concat_tables(found)
        return Output([table] if table.num_rows else [])

    def _labels(self, scanned: DocumentTable, kinds: Collection[str]) -> dict[str, Hashes]:
        """The keys of ids and URLs, in the order of the scan: [n, 16] by kind."""
        if not kinds:
            return {}
        source = self.unit.source
        paths = {"ids": source.columns.id or "id", "urls": self.url_column}
        paths = {kind: path for kind, path in paths.items() if kind in kinds}
        found: dict[str, list[bytes]] = {kind: [] for kind in paths}

        def choose(schema: pa.Schema) -> list[str]:
            return [path for path in paths.values() if column_of(schema, path) is not None]

        for index in np.unique(scanned.file).tolist():
            file = self.unit.files[index]
            rows = scanned.row[scanned.file == index].tolist()
            for record in raw_rows(file.uri, source, choose, rows):
                for kind, path in paths.items():
                    value = _label(record, path)
                    if kind == "ids" and not value:
                        value = f"{file.digest[:12]}:{record.row}"  # as `read_unit` names it
                    found[kind].append(_digest(value))
        return {kind: _as_keys(b"".join(keys)) for kind, keys in found.items()}


def _label(record: Record, path: str) -> str:
    try:
        return label(find(record.values, path)).strip()
    except ValueError:  # an object is no URL
        return ""


def documents_with(
    store: Store, hashes: Hashes, unit: tuple[Receipt, Sequence[str]]
) -> dict[str, Rows]:
    """The documents of a scanned unit whose text has one of some sorted hashes.

    Args:
        unit: its scan, and the digests of its files.

    Returns:
        Ascending rows by the digest of their file.
    """
    scan, digests = unit
    scanned = read_scans(store, [scan])
    hit = entries_of(scanned.hashes, hashes) >= 0
    found: dict[str, Rows] = {}
    for index in map(int, np.unique(scanned.file[hit])):
        add_rows(found, digests[index], scanned.row[hit & (scanned.file == index)])
    return found


def as_ranges(shares: Iterable[Mapping[str, Rows]]) -> Ranges:
    """The documents of all units, each a range of its own."""
    found: dict[str, Rows] = {}
    for share in shares:
        for file, rows in share.items():
            add_rows(found, file, rows)
    return {file: np.stack([rows, rows + 1], axis=1) for file, rows in found.items()}


def taken_rows(
    store: Store, documents: Ranges, grain: Grain, part: tuple[str, Sequence[str]]
) -> Rows:
    """Rows of a token part (its path, and the digests of its files) that hold taken documents."""
    path, files = part
    return rows_with(store.path(path), files, documents, grain)


def num_seen(documents: Ranges, seen: Ranges) -> int:
    """How many of some documents a model has seen (`read_seen`)."""
    both = documents.keys() & seen.keys()
    return sum(int(in_ranges(documents[file][:, 0], seen[file]).sum()) for file in both)


def stored_documents(store: Store, tokens: Manifest, name: str) -> Ranges:
    """The documents that the artifact `name` (of kind `drops`) takes from a pool, found again.

    Raises:
        ArtifactError: the artifact, or a scan of the pool, is not in the store.
    """
    made, units = store.get_manifest("drops", name), tokens.inputs["units"]
    scans = store.finished("scans", [unit["scan"] for unit in units])
    if missing := [unit["scan"] for unit in units if unit["scan"] not in scans]:
        raise ArtifactError(f"the scan {missing[0]} of the pool is no longer in the store")
    hashes = hash_array(read_table(store.path(made.parts[0].path))["hash"])
    found = [
        documents_with(store, hashes, (scans[u["scan"]], [f["sha256"] for f in u["files"]]))
        for u in units
    ]
    return as_ranges(found)
