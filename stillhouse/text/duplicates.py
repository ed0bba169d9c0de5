"""Exact duplicates after normalising, held-out splits, and the documents that are dropped for them.

Texts are known by 16 bytes of SHA-256: n of them are uint8 [n, 16]. Scans of a pool leave one hash
a document. Equal hashes have equal leading bits, so duplicates are found one hash range at a time:
memory holds about `DOCUMENTS_A_RANGE` hashes whatever the size of the pool. What a unit drops is
part of its identity; `unit_digests` adds up over ranges, so that their number does not matter.
"""

import hashlib
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stillhouse.storage.artifact import Receipt, Store
from stillhouse.storage.parquet import read_table
from stillhouse.storage.task import Output, Task

Hashes = NDArray[np.uint8]
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


def hash_range(hashes: Hashes, num_ranges: int) -> NDArray[np.int64]:
    """The number of the hash range that each row falls in: uint8[n, 16] -> int64[n]."""
    leading = _halves(hashes)[0] >> np.uint64(32)
    return (leading * np.uint64(num_ranges) >> np.uint64(32)).astype(np.int64)


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


def read_scans(
    store: Store, receipts: Sequence[Receipt], *, number: int = 0, num_ranges: int = 1
) -> DocumentTable:
    """The documents of all scanned units, in order, whose hash falls in range `number`."""
    unit, file = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
    row, hashes = [np.zeros(0, np.int64)], [np.zeros((0, 16), np.uint8)]
    for index, receipt in enumerate(receipts):
        for part in receipt.parts:
            table = read_table(store.path(part.path))
            all_hashes = hash_array(table["hash"])
            in_range = hash_range(all_hashes, num_ranges) == number
            unit.append(np.full(int(in_range.sum()), index, np.int32))
            file.append(table["file"].to_numpy()[in_range])
            row.append(table["row"].to_numpy()[in_range])
            hashes.append(all_hashes[in_range])
    return DocumentTable(
        np.concatenate(unit), np.concatenate(file), np.concatenate(row), np.concatenate(hashes)
    )


@dataclass(frozen=True)
class DuplicatesTask(Task):
    """Find the documents of one hash range whose text occurs earlier in the sorted pool."""

    KIND = "drops"
    VERSION = 2

    scans: tuple[Receipt, ...]
    number: int
    num_ranges: int

    def run(self, store: Store, host: Any, loaded: Any) -> Output:
        scanned = read_scans(store, self.scans, number=self.number, num_ranges=self.num_ranges)
        return _drops([scanned.where(later_occurrences(scanned.hashes), "duplicate")])


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
    table = pa.concat_tables(tables).unify_dictionaries().combine_chunks()
    table = table.sort_by([("unit", "ascending"), ("file", "ascending"), ("row", "ascending")])
    return Output([table], info={"units": unit_digests(table)})


def unit_digests(table: pa.Table) -> dict[str, str]:
    """By unit, a digest of the set of rows it drops: two sums of 64-bit hashes, mod 2^64.

    The table is sorted by unit. The digest of a union of disjoint sets is the sum of their digests
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


def hash_array(column: pa.ChunkedArray) -> Hashes:
    """A `binary(16)` column as uint8 [n, 16]."""
    values = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], pa.binary(16))
    buffer = values.buffers()[1]
    if buffer is None or len(values) == 0:
        return np.zeros((0, 16), np.uint8)
    flat = np.frombuffer(buffer, np.uint8)
    return flat[values.offset * 16 : (values.offset + len(values)) * 16].reshape(-1, 16)
