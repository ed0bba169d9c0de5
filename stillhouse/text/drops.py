"""Which documents are not packed: later copies of a text, and the other side of a held-out split.

The scan leaves 16 bytes a document. They are looked at one hash range at a time, so memory holds
about `DOCUMENTS_A_RANGE` of them whatever the size of the pool. What a unit drops is part of its
identity; `unit_digests` adds up per range, so that the number of ranges does not matter.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stillhouse.storage.artifact import Receipt, Store
from stillhouse.storage.parquet import read_table
from stillhouse.storage.task import Output, Task
from stillhouse.text.duplicates import hash_range, heldout_split, later_occurrences, mix

DOCUMENTS_A_RANGE = 8_000_000
_SALTS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1B54A32D192ED03))
DROPS_SCHEMA = pa.schema(
    [
        ("unit", pa.int32()),
        ("file", pa.int32()),
        ("row", pa.int64()),
        ("reason", pa.dictionary(pa.int8(), pa.string())),
    ]
)


@dataclass(frozen=True, slots=True)
class DocumentTable:
    """Addresses and hashes of n documents in their sorted order.

    Attributes:
        unit: [n], number of the scanned unit: two may have the same content.
        file, row: [n], in the unit.
        hashes: [n, 16].
    """

    unit: NDArray[np.int32]
    file: NDArray[np.int32]
    row: NDArray[np.int64]
    hashes: NDArray[np.uint8]

    def where(self, mask: NDArray[np.bool_], reason: str) -> pa.Table:
        """Some of the documents as rows of `DROPS_SCHEMA`."""
        count = int(mask.sum())
        reasons = pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int8)), [reason])
        columns = [pa.array(column[mask]) for column in (self.unit, self.file, self.row)]
        return pa.Table.from_arrays([*columns, reasons], schema=DROPS_SCHEMA)


def read_scans(
    store: Store, receipts: Sequence[Receipt], *, number: int = 0, num_ranges: int = 1
) -> DocumentTable:
    """The documents whose hash falls in range `number`, of all scanned units in order."""
    unit, file = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
    row, hashes = [np.zeros(0, np.int64)], [np.zeros((0, 16), np.uint8)]
    for index, receipt in enumerate(receipts):
        for part in receipt.parts:
            table = read_table(store.path(part.path))
            found = hash_array(table["hash"])
            mine = hash_range(found, num_ranges) == number
            unit.append(np.full(int(mine.sum()), index, np.int32))
            file.append(table["file"].to_numpy()[mine])
            row.append(table["row"].to_numpy()[mine])
            hashes.append(found[mine])
    return DocumentTable(
        np.concatenate(unit), np.concatenate(file), np.concatenate(row), np.concatenate(hashes)
    )


@dataclass(frozen=True)
class DuplicatesTask(Task):
    """Name every document of one hash range whose text stands earlier in the sorted pool."""

    KIND = "drops"
    VERSION = 2

    scans: tuple[Receipt, ...]
    number: int
    num_ranges: int

    def run(self, store: Store, host: Any, loaded: Any) -> Output:
        """One table."""
        scanned = read_scans(store, self.scans, number=self.number, num_ranges=self.num_ranges)
        return _drops([scanned.where(later_occurrences(scanned.hashes), "duplicate")])


@dataclass(frozen=True)
class SplitTask(Task):
    """What one side of a target drops: the training side, or the one that is held out.

    All copies of a text fall on one side, chosen by a keyed hash of the text itself.
    """

    KIND = "drops"
    VERSION = 2

    scans: tuple[Receipt, ...]
    share: float
    deduplicate: bool
    held_out: bool

    def run(self, store: Store, host: Any, loaded: Any) -> Output:
        """One table."""
        scanned = read_scans(store, self.scans)
        held = heldout_split(scanned.hashes, self.share, 0)
        later = np.zeros(len(held), bool)
        if self.deduplicate:
            later = later_occurrences(scanned.hashes)
        copies = scanned.where(later, "duplicate")
        other = ~held if self.held_out else held
        reason = "not held out" if self.held_out else "held out"
        return _drops([copies, scanned.where(other & ~later, reason)])


def _drops(tables: Iterable[pa.Table]) -> Output:
    table = pa.concat_tables(tables).unify_dictionaries().combine_chunks()
    table = table.sort_by([("unit", "ascending"), ("file", "ascending"), ("row", "ascending")])
    return Output([table], info={"units": unit_digests(table)})


def unit_digests(table: pa.Table) -> dict[str, str]:
    """By unit, a digest of the set of rows it drops: two sums of 64-bit hashes, mod 2^64.

    The table is sorted by unit. Sums of disjoint sets are the digest of their union
    (`add_digests`).
    """
    unit = table["unit"].to_numpy()
    rows = table["row"].to_numpy().astype(np.uint64)
    key = rows ^ (table["file"].to_numpy().astype(np.uint64) << np.uint64(40))
    starts = np.flatnonzero(np.diff(unit, prepend=-1))
    with np.errstate(over="ignore"):
        sums = [np.add.reduceat(mix(key + salt), starts) if len(unit) else key for salt in _SALTS]
    return {
        str(unit[start]): f"{int(low):016x}{int(high):016x}"
        for start, low, high in zip(starts, *sums, strict=True)
    }


def add_digests(digests: Iterable[str]) -> str:
    """The digest of a union of disjoint sets."""
    low = high = 0
    for digest in digests:
        low += int(digest[:16], 16)
        high += int(digest[16:], 16)
    return f"{low % 2**64:016x}{high % 2**64:016x}"


def hash_array(column: pa.ChunkedArray) -> NDArray[np.uint8]:
    """A `binary(16)` column as uint8 [n, 16]."""
    values = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], pa.binary(16))
    buffer = values.buffers()[1]
    if buffer is None or len(values) == 0:
        return np.zeros((0, 16), np.uint8)
    flat = np.frombuffer(buffer, np.uint8)
    return flat[values.offset * 16 : (values.offset + len(values)) * 16].reshape(-1, 16)
