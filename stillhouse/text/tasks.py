"""Tasks on units of raw files: scan their documents, or pack them into token parts.

A unit is a group of small files or a range of a large one. Both tasks stream: memory holds a batch
of documents and one part, whatever the size of the files.

Groups should hardly change when a file is added, so that finished parts are found again. Files are
taken in sorted order, and the end of a group of small files, of between a quarter of `GROUP_BYTES`
and all of it, depends on a file's own digest (content-defined chunking of whole files): after a
difference, two listings share all groups from the next border that they share.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stillhouse.data_settings import DataSource
from stillhouse.errors import BadFileError
from stillhouse.storage.artifact import Part, Store
from stillhouse.storage.task import Output, Place, Task
from stillhouse.text.documents import DeadLetter, Document, read_documents
from stillhouse.text.duplicates import document_hash, read_drops
from stillhouse.text.packing import Packer, pack, token_dtype, tokens_table
from stillhouse.text.pieces import LABELS_SCHEMA, label_table, read_pieces
from stillhouse.text.rows.record import ALL_ROWS
from stillhouse.text.tokenizer import Tokenizer, load_tokenizer

T = TypeVar("T")
_BATCH = 256
_SAMPLED = 64
_REASON_CHARS = 100
"""Documents of a unit that are decoded again, to check whether the tokenizer loses text."""
_SCAN_ROWS = 4_000_000
SCAN_SCHEMA = pa.schema(
    [("file", pa.int32()), ("row", pa.int64()), ("hash", pa.binary(16)), ("chars", pa.int32())]
)
DEAD_LETTER_SCHEMA = pa.schema(
    [("file", pa.int32()), ("row", pa.int64()), ("reason", pa.string()), ("preview", pa.string())]
)


@dataclass(frozen=True, slots=True)
class InputFile:
    """One input file.

    Attributes:
        uri: where it is.
        name: its path relative to the listing.
        size_bytes: its size as stored.
        digest: hex SHA-256 of its content.
        piece_rows: rows of each piece (`RowFormat.pieces`) of a file larger than a unit; else None.
        label: the source of all its rows, where a folder's name says so.
        kept: columns that are carried along, and are keys of its folders.
    """

    uri: str
    name: str
    size_bytes: int
    digest: str
    piece_rows: tuple[int, ...] | None = None
    label: str | None = None
    kept: tuple[tuple[str, str | None], ...] = ()

    def identity(self) -> list[Any]:
        """Its content, and what its folders' names say of it."""
        named = [self.label] if self.label is not None else []
        return [self.digest, *named, *([dict(self.kept)] if self.kept else [])]


@dataclass(frozen=True, slots=True)
class FileRange:
    """A whole file (`rows` None) or a half-open range of its rows; `file` is its index."""

    file: int
    rows: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Unit:
    """Files or ranges that are packed together, in order."""

    ranges: tuple[FileRange, ...]


GROUP_BYTES = 2**17
"""Largest unit of several files: a group is packed again when a file is added to it."""


def group_units(files: Sequence[InputFile], *, unit_bytes: int) -> list[Unit]:
    """Cut a sorted listing into units of at most about `unit_bytes`, every file exactly once.

    A file larger than a group is alone; larger than a unit, it is cut in ranges of whole pieces
    (row groups of Parquet, batches of an Arrow file), where its format has them. A short group at
    the end of the listing joins the unit before it where the two fit: the last few documents of a
    small listing are not left without a whole sequence.
    """
    limit = min(GROUP_BYTES, unit_bytes)
    units: list[Unit] = []
    group: list[FileRange] = []
    group_bytes = 0
    for index, file in enumerate(files):
        if group and group_bytes + file.size_bytes > limit:
            units.append(Unit(tuple(group)))
            group, group_bytes = [], 0
        if file.size_bytes > limit:
            units.extend(Unit((part,)) for part in _large_file(index, file, unit_bytes))
            continue
        group.append(FileRange(index))
        group_bytes += file.size_bytes
        # once per `limit / 4` bytes on average: the chance is proportional to the file's size
        closes = int(file.digest[:8], 16) * limit < 4 * max(file.size_bytes, 1) * 2**32
        if group_bytes * 4 >= limit and closes:
            units.append(Unit(tuple(group)))
            group, group_bytes = [], 0
    if units and group_bytes * 4 < limit:
        last = [files[part.file].size_bytes for part in units[-1].ranges]
        if sum(last) + group_bytes <= unit_bytes:
            return [*units[:-1], Unit((*units[-1].ranges, *group))]
    return [*units, Unit(tuple(group))] if group else units


def _large_file(index: int, file: InputFile, unit_bytes: int) -> Iterator[FileRange]:
    """Ranges of pieces, closed as soon as their share of the bytes reaches a unit."""
    if file.piece_rows is None:
        yield FileRange(index)
        return
    num_rows = sum(file.piece_rows)
    start = stop = 0
    for rows in file.piece_rows:
        stop += rows
        if stop == num_rows or (stop - start) * file.size_bytes >= unit_bytes * num_rows:
            yield FileRange(index, (start, stop))
            start = stop
        if stop == num_rows:
            return


@dataclass(frozen=True, slots=True)
class UnitFile:
    """One file of a unit, or a range of its rows; `label` is the source of all its rows, if any."""

    uri: Place[str]
    digest: str
    rows: tuple[int, int] | None
    label: str | None = None


@dataclass(frozen=True)
class ScanTask(Task):
    """Hash every document of a unit and collect the rows that cannot be used.

    Makes parts of `file, row, hash, chars`, and a table of the bad rows. Counts: documents, chars,
    `dead: REASON` without the details, and `absent: KEY` of documents without a key that the spec
    names (the first message in full in `info`).
    """

    KIND = "scans"
    VERSION = 2

    files: tuple[UnitFile, ...]
    source: DataSource

    def run(self, store: Store, host: Any, loaded: Any) -> Output:
        counts, info = Counter[str](), dict[str, Any]()
        dead: list[DeadLetter] = []
        named = dict[str, pa.Table]()
        return Output(self._tables(dead, counts, info, named), counts, info, named)

    def _tables(
        self,
        dead: list[DeadLetter],
        counts: Counter[str],
        info: dict[str, Any],
        named: dict[str, pa.Table],
    ) -> Iterator[pa.Table]:
        for batch in batched(self._documents(dead, counts, info), _SCAN_ROWS):
            columns = list(zip(*batch, strict=True))
            yield pa.table(dict(zip(SCAN_SCHEMA.names, columns, strict=True)), schema=SCAN_SCHEMA)
        rows = [{name: getattr(d, name) for name in DEAD_LETTER_SCHEMA.names} for d in dead]
        named["dead_letters"] = pa.Table.from_pylist(rows, schema=DEAD_LETTER_SCHEMA)
        counts.update(f"dead: {re.split('[:;]', letter.reason)[0]}" for letter in dead)

    def _documents(
        self, dead: list[DeadLetter], counts: Counter[str], info: dict[str, Any]
    ) -> Iterator[tuple[int, int, bytes, int]]:
        for item in read_unit(self):
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


@dataclass(frozen=True)
class TokenizerHost:
    """Workers that keep a tokenizer loaded."""

    path: Place[str]
    eos_token: str | None

    def build(self, store: Store) -> Tokenizer:
        return load_tokenizer(self.path, self.eos_token)


@dataclass(frozen=True)
class PackTask(Task):
    """Tokenise a unit and pack it into parts (`stillhouse.text.packing`).

    Makes the token parts, and a table `labels` with a row for each part and source
    (`label_table`). Counts: documents packed, tokens in sequences, remainder tokens and documents,
    and `dropped: REASON`; if the tokenizer may lose text, also its unknown tokens, and how many of
    some sampled documents it changes.

    Attributes:
        unit: the scanned unit.
        dropped: digest of the set of documents that are left out (`unit_digests`).
        tokenizer: its digest.
        eos_token: between documents.
        sequence_length: tokens.
        part_rows: sequences a part, at most.
        number: of the unit in the tables of `drops`.
        drops: the table with the documents to leave out; None without any.
    """

    KIND = "tokens"

    unit: ScanTask
    dropped: str
    tokenizer: str
    eos_token: str
    sequence_length: int
    part_rows: int
    number: Place[int] = 0
    drops: Place[Part | None] = None

    def tokens_in(self, table: pa.Table) -> int:
        return table.num_rows * self.sequence_length

    def run(self, store: Store, host: Tokenizer, loaded: Any) -> Output:
        counts, named = Counter[str](), dict[str, pa.Table]()
        return Output(self._tables(host, counts, named), counts, named=named)

    def _tables(
        self, tokenizer: Tokenizer, counts: Counter[str], named: dict[str, pa.Table]
    ) -> Iterator[pa.Table]:
        labels = [LABELS_SCHEMA.empty_table()]
        packer = Packer(
            sequence_length=self.sequence_length,
            eos_id=tokenizer.eos_id,
            dtype=token_dtype(tokenizer.vocab_size),
            part_rows=self.part_rows,
            masked=self.unit.source.columns.has_answers,
        )
        for packed in pack(packer, _tokenised(tokenizer, kept_documents(self, counts), counts)):
            table = tokens_table(packed)
            counts["tokens"] += self.tokens_in(table)
            labels.append(label_table(read_pieces(table)))
            yield table
        named["labels"] = pa.concat_tables(labels)
        counts["tokens"] += 0
        counts["remainder_tokens"] = packer.remainder_tokens
        counts["remainder_documents"] = packer.remainder_documents
        if self.unit.source.columns.has_answers:
            counts["split_documents"] = packer.split_documents


def read_unit(task: ScanTask) -> Iterator[Document | DeadLetter]:
    """The documents and dead letters of a unit in order; `file` is an index in the unit.

    Ids of rows that have none are made of the file's digest and the row, so that they do not change
    with the file's name.
    """
    for index in range(len(task.files)):
        if task.source.skip_bad_files:
            try:  # to the end, before any of its rows is used: it may break in the middle
                for _ in _read_file(task, index):
                    pass
            except BadFileError as error:
                yield DeadLetter(index, -1, "unreadable file", str(error)[:200])
                continue
        yield from _read_file(task, index)


def _read_file(task: ScanTask, index: int) -> Iterator[Document | DeadLetter]:
    file = task.files[index]
    return read_documents(
        file.uri,
        file=index,
        name=file.digest[:12],
        settings=task.source,
        rows=range(*file.rows) if file.rows else ALL_ROWS,
        label=file.label,
    )


def _tokenised(
    tokenizer: Tokenizer, documents: Iterable[Document], counts: Counter[str]
) -> Iterator[tuple[Document, NDArray[np.uint32], NDArray[np.uint8] | None]]:
    unknown, exact = tokenizer.unknown_id, tokenizer.is_exact
    for batch in batched(documents, _BATCH):
        if any(document.messages is not None for document in batch):
            batch, ids, masks = _conversations(tokenizer, batch, counts)
        else:
            ids, masks = _texts(tokenizer, batch)
        if unknown is not None:
            counts["unknown_tokens"] += sum(int((row == unknown).sum()) for row in ids)
        sample = 0 if exact else _SAMPLED - counts["sampled_documents"]
        for document, row in zip(batch[:sample], ids[:sample], strict=True):
            if document.messages is None:
                counts["sampled_documents"] += 1
                changed = tokenizer.decode(row).strip() != document.text.strip()
                counts["changed_documents"] += changed
        yield from zip(batch, ids, masks, strict=True)


def _texts(
    tokenizer: Tokenizer, batch: list[Document]
) -> tuple[list[NDArray[np.uint32]], list[NDArray[np.uint8] | None]]:
    """The tokens of texts, and the masks of those that begin with a prompt."""
    ids = tokenizer.encode_batch([document.text[document.prompt_chars :] for document in batch])
    masks: list[NDArray[np.uint8] | None] = [None] * len(batch)
    prompts = [i for i, document in enumerate(batch) if document.prompt_chars]
    before = tokenizer.encode_batch([batch[i].text[: batch[i].prompt_chars] for i in prompts])
    for i, tokens in zip(prompts, before, strict=True):  # no token spans prompt and answer
        mask = np.zeros(len(tokens), np.uint8), np.ones(len(ids[i]) + 1, np.uint8)
        ids[i], masks[i] = np.concatenate([tokens, ids[i]]), np.concatenate(mask)
    return ids, masks


def _conversations(
    tokenizer: Tokenizer, batch: list[Document], counts: Counter[str]
) -> tuple[list[Document], list[NDArray[np.uint32]], list[NDArray[np.uint8] | None]]:
    """The conversations that the tokenizer's chat template can write; others are dropped."""
    kept: list[Document] = []
    ids: list[NDArray[np.uint32]] = []
    masks: list[NDArray[np.uint8] | None] = []
    for document in batch:
        assert document.messages is not None
        try:
            tokens, mask = tokenizer.encode_chat(document.messages)
        except ValueError as error:
            counts[f"dropped: {str(error)[:_REASON_CHARS]}"] += 1
            counts["documents"] -= 1
            continue
        kept.append(document)
        ids.append(tokens)
        masks.append(mask)
    return kept, ids, masks


def kept_documents(task: PackTask, counts: Counter[str] | None = None) -> Iterator[Document]:
    """The documents that a task packs, in order; `counts` gets documents and drops."""
    counts = Counter() if counts is None else counts
    dropped: dict[tuple[int, int], str] = {}
    if task.drops is not None:
        rows = read_drops(task.drops.uri, task.drops.num_bytes, task.number).to_pylist()
        dropped = {(row["file"], row["row"]): row["reason"] for row in rows}
    for item in read_unit(task.unit):
        if isinstance(item, DeadLetter):
            continue
        reason = dropped.get((item.file, item.row))
        if reason is not None:
            counts[f"dropped: {reason}"] += 1
            continue
        counts["documents"] += 1
        yield item


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """The items in lists of `size`, the last one shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
