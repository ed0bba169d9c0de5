"""Exact duplicates after normalising, held-out splits, and the documents that are dropped for them.

Texts are known by 16 bytes of SHA-256: n of them are uint8 [n, 16]. Scans of a pool leave one hash
a document. Equal hashes have equal leading bits, so that duplicates are found one range of hashes
at a time, in three steps whose cost grows as the pool does:

* batches of scanned units are sorted by hash (`HashesTask`);
* a task for each range of hashes reads that range of every batch (`DuplicatesTask`);
* what all ranges drop is sorted by unit again, a block of units a task (`DropsTask`), so that the
  packing of a unit reads its own rows.

A new shard changes its batch, and the two steps that follow, which read hashes alone. What a unit
drops is part of its identity; `unit_digests` does not depend on ranges and batches.
"""

import hashlib
import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from stillhouse.fingerprint import content_batches
from stillhouse.storage.artifact import Receipt, Store
from stillhouse.storage.parquet import read_groups, read_table
from stillhouse.storage.task import Output, Task

Hashes = NDArray[np.uint8]
DOCUMENTS_A_RANGE = 32_000_000
"""Memory of a task: about 100 bytes a document."""
UNITS_A_BLOCK = 4096
NOTHING_DROPPED = "0" * 32
"""The digest of no rows (`unit_digests`)."""
_SALTS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1B54A32D192ED03))
HASHES_SCHEMA = pa.schema(
    [("hash", pa.binary(16)), ("unit", pa.int32()), ("file", pa.int32()), ("row", pa.int64())]
)
DROPS_SCHEMA = pa.schema(
    [
        ("unit", pa.int32()),
        ("file", pa.int32()),
        ("row", pa.int64()),
        ("reason", pa.dictionary(pa.int8(), pa.string())),
    ]
)


def normalise(text: str) -> str:
    """NFKC, lower case, every run of white space one space, none at the ends."""
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


def document_hash(text: str) -> bytes:
    """The first 16 bytes of SHA-256 over the normalised text, in which lone surrogates may be."""
    return hashlib.sha256(normalise(text).encode(errors="surrogatepass")).digest()[:16]


def later_occurrences(hashes: Hashes) -> NDArray[np.bool_]:
    """True for each row whose hash an earlier row has: uint8[n, 16] -> bool[n]. O(n log n)."""
    upper, lower = _halves(hashes)
    order = np.lexsort((lower, upper))  # stable: equal hashes stay in their order
    same = (upper[order][1:] == upper[order][:-1]) & (lower[order][1:] == lower[order][:-1])
    later = np.zeros(len(order), dtype=np.bool_)
    later[order[1:][same]] = True
    return later


def heldout_split(hashes: Hashes, share: float) -> NDArray[np.bool_]:
    """Hold out about `share` of the texts: uint8[n, 16] -> bool[n], all copies on one side.

    The side of a text depends on its hash alone, with two exceptions: of two or more rows at least
    one is held out, and of two or more different texts at least one is not.
    """
    draw = keyed_uniform(_halves(hashes)[0], 0)
    if len(draw) < 2:
        return np.zeros(len(draw), dtype=np.bool_)
    held_out = (draw < share) | (draw == draw.min())
    return held_out & ((draw != draw.max()) | (draw.min() == draw.max()))


def keyed_uniform(keys: NDArray[np.uint64], seed: int) -> NDArray[np.float64]:
    """A number in (0, 1) for each (key, seed), the same everywhere: uint64[n] -> float64[n].

    Two rounds of the finaliser of SplitMix64 (Steele, Lea, Flood 2014), 52 bits kept.
    """
    seed_key = np.uint64(int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:8], "big"))
    mixed = mix(mix(keys) + seed_key)
    return ((mixed >> np.uint64(12)).astype(np.float64) + 0.5) / 2.0**52


def mix(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64: a bijection of uint64 that spreads every bit."""
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))


def _halves(hashes: Hashes) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """The big-endian halves of each hash."""
    halves = np.ascontiguousarray(hashes).view(">u8").reshape(-1, 2).astype(np.uint64)
    return halves[:, 0], halves[:, 1]


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
    hashes: Hashes

    def where(self, mask: NDArray[np.bool_], reason: str) -> pa.Table:
        """The masked documents as rows of `DROPS_SCHEMA`."""
        count = int(mask.sum())
        reasons = pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int8)), [reason])
        columns = [pa.array(column[mask]) for column in (self.unit, self.file, self.row)]
        return pa.Table.from_arrays([*columns, reasons], schema=DROPS_SCHEMA)


def read_scans(store: Store, receipts: Sequence[Receipt]) -> DocumentTable:
    """The documents of all scanned units, in order."""
    tables: list[DocumentTable] = []
    for index, receipt in enumerate(receipts):
        for part in receipt.parts:
            table = read_table(store.path(part.path))
            unit = np.full(table.num_rows, index, np.int32)
            tables.append(_documents(table.append_column("unit", pa.array(unit))))
    return _joined(tables)


def _documents(table: pa.Table, first_unit: int = 0) -> DocumentTable:
    """The documents of a table of `HASHES_SCHEMA`, whose units are counted from `first_unit`."""
    unit, file, row = (table[name].to_numpy() for name in ("unit", "file", "row"))
    return DocumentTable(unit + np.int32(first_unit), file, row, hash_array(table["hash"]))


def _joined(tables: Sequence[DocumentTable]) -> DocumentTable:
    tables = [_documents(HASHES_SCHEMA.empty_table()), *tables]
    return DocumentTable(
        *(np.concatenate([getattr(t, f.name) for t in tables]) for f in fields(DocumentTable))
    )


def unit_batches(scans: Sequence[Receipt]) -> list[tuple[Receipt, ...]]:
    """Cut the scanned units of a pool into batches of about the square root of their number.

    A new unit changes the batch it lies in; every fourfold growth of the pool doubles the batches.
    """
    most = 2 ** (math.ceil(math.log2(max(len(scans), 1)) / 2) + 2)
    batches = content_batches([receipt.task for receipt in scans], most)
    return [tuple(scans[batch.start : batch.stop]) for batch in batches]


@dataclass(frozen=True)
class HashesTask(Task):
    """Sort the documents of a batch of scanned units by hash, equal ones by their order."""

    KIND = "hashes"
    ROW_GROUP = 4096

    scans: tuple[Receipt, ...]

    def run(self, store: Store, host: Any, loaded: Any) -> Output:
        documents = read_scans(store, self.scans)
        order = np.lexsort(_halves(documents.hashes)[::-1])  # stable
        columns = [
            binary_array(documents.hashes[order]),
            *(pa.array(c[order]) for c in (documents.unit, documents.file, documents.row)),
        ]
        counts = {"documents": len(order), "units": len(self.scans)}
        return Output([pa.Table.from_arrays(columns, schema=HASHES_SCHEMA)], counts)


@dataclass(frozen=True)
class DuplicatesTask(Task):
    """Find the documents of one range of hashes whose text occurs earlier in the sorted pool.

    Attributes:
        batches: of `HashesTask`, in the order of the pool.
        number, num_ranges: which of how many ranges.
    """

    KIND = "drops"
    VERSION = 3

    batches: tuple[Receipt, ...]
    number: int
    num_ranges: int

    def run(self, store: Store, host: Any, loaded: Any) -> Output:
        low, high = (-(-r * 2**64 // self.num_ranges) for r in (self.number, self.number + 1))

        def overlaps(group: pq.RowGroupMetaData) -> bool:
            bounds = _bounds(group)
            return bounds is not None and _leading(bounds[1]) >= low and _leading(bounds[0]) < high

        tables: list[DocumentTable] = []
        first_unit = 0
        for batch in self.batches:
            for part in batch.parts:
                table = read_groups(store.path(part.path), part.num_bytes, overlaps)
                upper = _halves(hash_array(table["hash"]))[0]
                # sorted, and 2**64 is no uint64
                rows = slice(*(_before(upper, bound) for bound in (low, high)))
                tables.append(_documents(table[rows], first_unit))
            first_unit += batch.counts["units"]
        documents = _joined(tables)
        return Output([_sorted(documents.where(later_occurrences(documents.hashes), "duplicate"))])


def _bounds(group: pq.RowGroupMetaData) -> tuple[Any, Any] | None:
    """The smallest and the largest value of the first column; None where there are no rows."""
    found = group.column(0).statistics
    return (found.min, found.max) if found is not None and found.has_min_max else None


def _leading(value: bytes) -> int:
    return int.from_bytes(value[:8], "big")


def _before(ascending: NDArray[np.uint64], bound: int) -> int:
    """How many of some sorted numbers are below `bound`, of which 2**64 is one."""
    if bound >= 2**64:
        return len(ascending)
    return int(np.searchsorted(ascending, np.uint64(bound)))


@dataclass(frozen=True)
class DropsTask(Task):
    """What the units of one block drop: the rows that all ranges of hashes found in them.

    Attributes:
        ranges: of `DuplicatesTask`.
        block: of `UNITS_A_BLOCK` units.
    """

    KIND = "drops"

    ranges: tuple[Receipt, ...]
    block: int

    def run(self, store: Store, host: Any, loaded: Any) -> Output:
        first = self.block * UNITS_A_BLOCK
        parts = [part for receipt in self.ranges for part in receipt.parts]
        tables = [read_drops(store.path(p.path), p.num_bytes, first, UNITS_A_BLOCK) for p in parts]
        return _drops(tables)


def read_drops(uri: str, num_bytes: int, first_unit: int, num_units: int = 1) -> pa.Table:
    """The rows of `DROPS_SCHEMA` of some units in a row, from a table that is sorted by unit."""
    last = first_unit + num_units - 1

    def overlaps(group: pq.RowGroupMetaData) -> bool:
        bounds = _bounds(group)
        return bounds is not None and bounds[1] >= first_unit and bounds[0] <= last

    table = read_groups(uri, num_bytes, overlaps)
    return table.filter((pc.field("unit") >= first_unit) & (pc.field("unit") <= last))


@dataclass(frozen=True)
class SplitTask(Task):
    """Find what one side of a target drops: the training side, or the held-out side.

    All copies of a text are on one side, chosen by a keyed hash of the text itself.
    """

    KIND = "drops"
    VERSION = 2

    scans: tuple[Receipt, ...]
    share: float
    deduplicate: bool
    held_out: bool

    def run(self, store: Store, host: Any, loaded: Any) -> Output:
        scanned = read_scans(store, self.scans)
        held = heldout_split(scanned.hashes, self.share)
        later = np.zeros(len(held), bool)
        if self.deduplicate:
            later = later_occurrences(scanned.hashes)
        copies = scanned.where(later, "duplicate")
        other = ~held if self.held_out else held
        reason = "not held out" if self.held_out else "held out"
        return _drops([copies, scanned.where(other & ~later, reason)])


def _drops(tables: Iterable[pa.Table]) -> Output:
    table = _sorted(pa.concat_tables(tables))
    return Output([table], info={"units": unit_digests(table)})


def _sorted(table: pa.Table) -> pa.Table:
    keys = [("unit", "ascending"), ("file", "ascending"), ("row", "ascending")]
    return table.unify_dictionaries().combine_chunks().sort_by(keys)


def unit_digests(table: pa.Table) -> dict[str, str]:
    """By unit, a digest of the set of rows it drops: two sums of 64-bit hashes, mod 2^64.

    The table is sorted by unit.
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


def binary_array(keys: Hashes) -> pa.Array:
    """uint8 [n, 16] as a `binary(16)` array."""
    buffers = [None, pa.py_buffer(np.ascontiguousarray(keys).tobytes())]
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(keys), buffers)


def hash_array(column: pa.ChunkedArray) -> Hashes:
    """A `binary(16)` column as uint8 [n, 16]."""
    values = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], pa.binary(16))
    buffer = values.buffers()[1]
    if buffer is None or len(values) == 0:
        return np.zeros((0, 16), np.uint8)
    flat = np.frombuffer(buffer, np.uint8)
    return flat[values.offset * 16 : (values.offset + len(values)) * 16].reshape(-1, 16)
