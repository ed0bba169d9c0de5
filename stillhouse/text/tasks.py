"""Tasks on units of raw files: scan their documents, or turn them into token parts.

A unit is a group of small files or a range of a large one (`stillhouse.text.units`). Both tasks
stream: memory holds a batch of documents and one part, whatever the size of the files.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from stillhouse.data_settings import DataSource
from stillhouse.errors import BadFileError
from stillhouse.storage.artifact import Store
from stillhouse.storage.parquet import read_table
from stillhouse.storage.task import Output, Place, Task
from stillhouse.text.documents import DeadLetter, Document, read_documents
from stillhouse.text.duplicates import document_hash
from stillhouse.text.packing import Packer, pack, token_dtype, tokens_table
from stillhouse.text.pieces import LABELS_SCHEMA, label_table, read_pieces
from stillhouse.text.tokenizer import Tokenizer, load_tokenizer

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
    """One file of a unit, or a range of its rows, known by the digest of its content.

    `label` is the source of all its rows, where a folder's name says so.
    """

    uri: Place[str]
    digest: str
    rows: tuple[int, int] | None
    label: str | None = None


@dataclass(frozen=True)
class ScanTask(Task):
    """Hash every document of a unit and set aside the rows that cannot be used.

    Makes parts of `file, row, hash, chars`; bad rows become a table of their own. Counts:
    documents, chars, `dead: REASON` without the details, and `absent: KEY` of documents without a
    key that the spec names, the first one whole in `info`.
    """

    KIND = "scans"
    VERSION = 2

    files: tuple[UnitFile, ...]
    source: DataSource

    def run(self, store: Store, host: Any, loaded: Any) -> Output:
        """Read all of it, batch by batch."""
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
    """Workers with a tokenizer: the one in a folder, and the token between documents."""

    path: Place[str]
    eos_token: str | None

    def build(self, store: Store) -> Tokenizer:
        """Load it."""
        return load_tokenizer(self.path, self.eos_token)


@dataclass(frozen=True)
class PackTask(Task):
    """Tokenise a unit and pack it into parts (`stillhouse.text.packing`).

    Beside the parts stand the labels of their sources, a row for each part and label
    (`label_table`). Counts: documents packed, tokens in sequences, tokens of the remainder and
    documents wholly in it, and `dropped: REASON`; where the tokenizer may lose text, also its
    unknown tokens, and how many of some sampled documents it changes.

    Attributes:
        unit: what is read.
        dropped: digest of the set of documents that are left out (`stillhouse.text.drops`).
        tokenizer: its digest.
        eos_token: between documents.
        sequence_length: tokens.
        part_rows: sequences a part, at most.
        number: of the unit in its source, by which these tables know it.
        drops: URIs of the tables that name the documents to leave out.
    """

    KIND = "tokens"

    unit: ScanTask
    dropped: str
    tokenizer: str
    eos_token: str
    sequence_length: int
    part_rows: int
    number: Place[int] = 0
    drops: Place[tuple[str, ...]] = ()

    def tokens_in(self, table: pa.Table) -> int:
        """Of all its sequences."""
        return table.num_rows * self.sequence_length

    def run(self, store: Store, host: Tokenizer, loaded: Any) -> Output:
        """Tokenise and pack, part by part."""
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
            masked=self.unit.source.columns.prompt is not None,
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


def read_unit(task: ScanTask) -> Iterator[Document | DeadLetter]:
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


def _read_file(task: ScanTask, index: int) -> Iterator[Document | DeadLetter]:
    file = task.files[index]
    return read_documents(
        file.uri,
        file=index,
        name=file.digest[:12],
        settings=task.source,
        rows=file.rows,
        label=file.label,
    )


def _why_unreadable(task: ScanTask, index: int) -> str | None:
    """Read a file to its end before any of its rows is used: it may break in the middle."""
    try:
        for _ in _read_file(task, index):
            pass
    except BadFileError as error:
        return str(error)
    return None


def _tokenised(
    tokenizer: Tokenizer, documents: Iterable[Document], counts: Counter[str]
) -> Iterator[tuple[Document, NDArray[np.uint32]]]:
    unknown, exact = tokenizer.unknown_id, tokenizer.is_exact
    for batch in batched(documents, _BATCH):
        ids = tokenizer.encode_batch([document.text[document.prompt_chars :] for document in batch])
        prompts = [i for i, document in enumerate(batch) if document.prompt_chars]
        before = tokenizer.encode_batch([batch[i].text[: batch[i].prompt_chars] for i in prompts])
        for i, tokens in zip(prompts, before, strict=True):  # apart: the border is one of tokens
            ids[i] = np.concatenate([tokens, ids[i]])
            batch[i] = replace(batch[i], prompt_tokens=len(tokens))
        if unknown is not None:
            counts["unknown_tokens"] += sum(int((row == unknown).sum()) for row in ids)
        sample = 0 if exact else _SAMPLED - counts["sampled_documents"]
        for document, row in zip(batch[:sample], ids[:sample], strict=True):
            counts["sampled_documents"] += 1
            counts["changed_documents"] += tokenizer.decode(row).strip() != document.text.strip()
        yield from zip(batch, ids, strict=True)


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
        mine = table.filter(pc.field("unit") == task.number)
        for row in mine.to_pylist():
            rows[row["file"], row["row"]] = row["reason"]
    return rows


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """The items in lists of `size`, the last one shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
