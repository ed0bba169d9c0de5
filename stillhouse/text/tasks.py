"""What one task does with one unit of raw files: scan it, or turn it into token parts.

A unit is a group of small files or a range of a large one (`stillhouse.text.units`). Both tasks
stream: memory holds a batch of documents and one part, whatever the size of the files.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from stillhouse.errors import BadFileError
from stillhouse.fingerprint import fingerprint
from stillhouse.spec import DataSource
from stillhouse.storage.artifact import PartRef, Receipt, Store
from stillhouse.storage.parquet import read_table
from stillhouse.text.documents import DeadLetter, Document, read_documents
from stillhouse.text.duplicates import document_hash
from stillhouse.text.packing import Packer, pack, token_dtype, tokens_table
from stillhouse.text.tokenizer import Tokenizer

T = TypeVar("T")
_BATCH = 256
_SAMPLED = 64
"""Documents of a unit that are decoded again, to see whether a tokenizer loses text."""
_SCAN_ROWS = 4_000_000
SCAN_SCHEMA = pa.schema(
    [("file", pa.int32()), ("row", pa.int64()), ("hash", pa.binary(16)), ("chars", pa.int32())]
)
DEAD_LETTER_SCHEMA = pa.schema(
    [("file", pa.int32()), ("row", pa.int64()), ("reason", pa.string()), ("preview", pa.string())]
)


@dataclass(frozen=True, slots=True)
class UnitFile:
    """One file of a unit, or a range of its rows. The digest is its identity, the URI its place.

    `label` is the source of all its rows, where a folder's name says so.
    """

    uri: str
    digest: str
    rows: tuple[int, int] | None
    label: str | None = None


@dataclass(frozen=True, slots=True)
class UnitTask:
    """A unit to scan or pack. `fingerprint` names the result, `index` the unit in its input."""

    fingerprint: str
    index: int
    files: tuple[UnitFile, ...]
    source: DataSource


@dataclass(frozen=True, slots=True)
class PackTask:
    """A unit to pack into parts of at most `part_rows` sequences, without the rows in `drops`."""

    unit: UnitTask
    drops: tuple[str, ...]
    sequence_length: int
    part_rows: int

    @property
    def fingerprint(self) -> str:
        """The unit's."""
        return self.unit.fingerprint


def read_unit(task: UnitTask) -> Iterator[Document | DeadLetter]:
    """The documents of a unit in order; `file` counts the unit's own files.

    Ids of rows that have none are made from the file's digest and the row, so that they do not
    change with the file's name.
    """
    for index in range(len(task.files)):
        broken = _why_unreadable(task, index) if task.source.skip_bad_files else None
        if broken is not None:
            yield DeadLetter(index, -1, "unreadable file", broken[:200])
        else:
            yield from _read_file(task, index)


def _read_file(task: UnitTask, index: int) -> Iterator[Document | DeadLetter]:
    file = task.files[index]
    return read_documents(
        file.uri,
        file=index,
        name=file.digest[:12],
        settings=task.source,
        rows=file.rows,
        label=file.label,
    )


def _why_unreadable(task: UnitTask, index: int) -> str | None:
    """Read a file to its end before any of its rows is used: it may break in the middle."""
    try:
        for _ in _read_file(task, index):
            pass
    except BadFileError as error:
        return str(error)
    return None


def scan_unit(store: Store, task: UnitTask) -> Receipt:
    """Hash every document of a unit and set aside the rows that cannot be used.

    Makes parts of `file, row, hash, chars`; dead letters become a part of their own, named in the
    receipt's `info`. Counts: documents, chars, `dead: REASON` without the details, and
    `absent: KEY` of documents without a key that the spec names, the first one whole in `info`.
    """
    dead: list[DeadLetter] = []
    counts: Counter[str] = Counter()
    parts: list[PartRef] = []
    info: dict[str, Any] = {}
    for number, batch in enumerate(_batches(_scan(task, dead, counts, info), _SCAN_ROWS)):
        columns = list(zip(*batch, strict=True))
        table = pa.table(dict(zip(SCAN_SCHEMA.names, columns, strict=True)), schema=SCAN_SCHEMA)
        path = f"scans/parts/{task.fingerprint}-{number:05d}.parquet"
        parts.append(store.put_part(path, table, num_tokens=0))
    files: dict[str, str] = {}
    if dead:
        table = pa.Table.from_pylist([_letter(d) for d in dead], schema=DEAD_LETTER_SCHEMA)
        path = f"scans/dead/{task.fingerprint}.parquet"
        info["dead_letters"] = path
        files[path] = store.put_part(path, table, num_tokens=0).sha256
    counts.update(f"dead: {re.split('[:;]', letter.reason)[0]}" for letter in dead)
    made = Receipt(task.fingerprint, tuple(parts), dict(sorted(counts.items())), info, files)
    return store.put_receipt("scans", made)


def _scan(
    task: UnitTask, dead: list[DeadLetter], counts: Counter[str], info: dict[str, Any]
) -> Iterator[tuple[int, int, bytes, int]]:
    for item in read_unit(task):
        if isinstance(item, DeadLetter):
            dead.append(item)
            continue
        counts["documents"] += 1
        counts["chars"] += len(item.text)
        if item.absent:
            key = f"absent: {item.absent.split(';')[0]}"
            counts[key] += 1
            info.setdefault(key, item.absent)
        yield item.file, item.row, document_hash(item.text), len(item.text)


def _letter(letter: DeadLetter) -> dict[str, Any]:
    return {name: getattr(letter, name) for name in DEAD_LETTER_SCHEMA.names}


def pack_unit(store: Store, tokenizer: Tokenizer, task: PackTask) -> Receipt:
    """Tokenise a unit and pack it into sequences.

    Makes token parts (`stillhouse.text.packing`). Counts: documents packed, tokens in sequences,
    tokens of the remainder and documents wholly in it, and `dropped: REASON` for documents that
    `drops` names; where the tokenizer may lose text, also its unknown tokens, and how many of some
    sampled documents it changes.
    """
    counts: Counter[str] = Counter()
    packer = Packer(
        sequence_length=task.sequence_length,
        eos_id=tokenizer.eos_id,
        dtype=token_dtype(tokenizer.vocab_size),
        part_rows=task.part_rows,
    )
    parts: list[PartRef] = []
    for packed in pack(packer, _tokenised(tokenizer, kept_documents(task, counts), counts)):
        path = f"tokens/parts/{part_name(task.unit.fingerprint, len(parts))}.parquet"
        table = tokens_table(packed)
        num_tokens = table.num_rows * task.sequence_length
        parts.append(store.put_part(path, table, num_tokens=num_tokens))
    counts["tokens"] = sum(part.num_tokens for part in parts)
    counts["remainder_tokens"] = packer.remainder_tokens
    counts["remainder_documents"] = packer.remainder_documents
    return store.put_receipt(
        "tokens", Receipt(task.unit.fingerprint, tuple(parts), dict(sorted(counts.items())))
    )


def _tokenised(
    tokenizer: Tokenizer, documents: Iterable[Document], counts: Counter[str]
) -> Iterator[tuple[Document, NDArray[np.uint32]]]:
    unknown, exact = tokenizer.unknown_id, tokenizer.is_exact
    for batch in _batches(documents, _BATCH):
        ids = tokenizer.encode_batch([document.text for document in batch])
        if unknown is not None:
            counts["unknown_tokens"] += sum(int((row == unknown).sum()) for row in ids)
        sample = 0 if exact else _SAMPLED - counts["sampled_documents"]
        for document, row in zip(batch[:sample], ids[:sample], strict=True):
            counts["sampled_documents"] += 1
            counts["changed_documents"] += tokenizer.decode(row).strip() != document.text.strip()
        yield from zip(batch, ids, strict=True)


def part_name(task: str, number: int) -> str:
    """The fingerprint of the `number`-th part of a task."""
    return fingerprint([task, number])


def kept_documents(task: PackTask, counts: Counter[str] | None = None) -> Iterator[Document]:
    """The documents that a task packs, in order; `counts` is told of the dropped ones."""
    counts = Counter() if counts is None else counts
    dropped = _dropped_rows(task)
    for item in read_unit(task.unit):
        if isinstance(item, DeadLetter):
            continue
        reason = dropped.get((item.file, item.row))
        if reason is not None:
            counts[f"dropped: {reason}"] += 1
            continue
        counts["documents"] += 1
        yield item


def _dropped_rows(task: PackTask) -> dict[tuple[int, int], str]:
    rows: dict[tuple[int, int], str] = {}
    for uri in task.drops:
        table = read_table(uri)
        mine = table.filter(pc.field("unit") == task.unit.index)
        for row in mine.to_pylist():
            rows[row["file"], row["row"]] = row["reason"]
    return rows


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
