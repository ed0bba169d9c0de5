"""Documents joined by EOS and cut into sequences of T tokens, with the owner of every position.

    stream = document 0, EOS, document 1, EOS, ...        sequence i = stream[i T : (i + 1) T]

The EOS after a document belongs to it. A document that crosses a border has a piece in each
sequence it touches; pieces tile [0, T) exactly. The tokens after the last whole sequence of a part
are dropped and counted.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import DTypeLike, NDArray

from stillhouse.text.documents import Document
from stillhouse.text.pieces import LOSS_MASK


class Owner(NamedTuple):
    """The document that some tokens belong to: id, source label, raw file index and raw row."""

    id: str
    source: str
    file: int
    row: int


@dataclass(frozen=True, slots=True)
class Packed:
    """n complete sequences, and the p pieces of documents that they consist of.

    Attributes:
        input_ids: [n, T] uint16 or uint32.
        piece_offsets: int32 [n + 1]; sequence i has the pieces [offsets[i], offsets[i + 1]).
        piece_start: int32 [p], first position of the piece in its sequence.
        piece_end: int32 [p], one past its last.
        piece_owner: int64 [p], index into `owners`.
        owners: the documents of the part in order (some may have no piece).
        mask: uint8 [n, T], 1 for tokens of answers; None where no document has a prompt.
    """

    input_ids: NDArray[Any]
    piece_offsets: NDArray[np.int32]
    piece_start: NDArray[np.int32]
    piece_end: NDArray[np.int32]
    piece_owner: NDArray[np.int64]
    owners: list[Owner]
    mask: NDArray[np.uint8] | None = None


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 where every id fits (vocabularies up to 65,536), else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 65_536 else np.uint32)


class Packer:
    """Packs documents one by one into parts of at least `part_rows` sequences.

    A part closes at the end of the document that fills it, so that no document lies in two parts;
    the tokens after its last whole sequence are dropped. Memory: one part and one document.

    Attributes:
        num_rows: sequences so far.
        remainder_tokens: tokens dropped so far.
        remainder_documents: documents all of whose tokens were dropped.
        split_documents: of those with answers, documents that go on in another sequence.
    """

    def __init__(
        self,
        *,
        sequence_length: int,
        eos_id: int,
        dtype: DTypeLike,
        part_rows: int,
        masked: bool = False,
    ) -> None:
        self.num_rows = 0
        self.remainder_tokens = self.remainder_documents = self.split_documents = 0
        self._sequence_length = sequence_length
        self._eos = np.array([eos_id], dtype)
        self._capacity = part_rows * sequence_length
        self._masked = masked
        self._start_part()

    def _start_part(self) -> None:
        self._tokens: list[NDArray[Any]] = []
        self._filled = 0
        self._owners: list[Owner] = []
        self._owner_starts: list[int] = []
        self._masks: list[NDArray[np.uint8]] = []

    def add(
        self, document: Document, ids: NDArray[Any], mask: NDArray[np.uint8] | None = None
    ) -> Packed | None:
        """Append a document and its EOS; returns the part that it filled, or None.

        Args:
            document: the owner of the tokens.
            ids: its tokens [n], without EOS; n may be 0.
            mask: uint8 [n + 1], 1 for tokens of answers and for an EOS behind one; default all.
        """
        if self._masked:
            self._masks.append(np.ones(len(ids) + 1, np.uint8) if mask is None else mask)
            length = self._sequence_length
            self.split_documents += self._filled // length != (self._filled + len(ids)) // length
        self._owners.append(Owner(document.id, document.source, document.file, document.row))
        self._owner_starts.append(self._filled)
        self._tokens += [ids.astype(self._eos.dtype), self._eos]
        self._filled += len(ids) + 1
        return self.finish() if self._filled >= self._capacity else None

    def finish(self) -> Packed:
        """Close the part, which may have no rows."""
        length = self._sequence_length
        num_rows, remainder = divmod(self._filled, length)
        tokens = np.concatenate([self._eos[:0], *self._tokens])[: num_rows * length]
        mask = None
        if self._masked:
            flat = np.concatenate([np.zeros(0, np.uint8), *self._masks])[: len(tokens)]
            mask = flat.reshape(-1, length)
        packed = replace(_cut(tokens, length, self._owners, self._owner_starts), mask=mask)
        self.num_rows += num_rows
        self.remainder_tokens += remainder
        self.remainder_documents += sum(start >= len(tokens) for start in self._owner_starts)
        self._start_part()
        return packed


def pack(
    packer: Packer, documents: Iterable[tuple[Document, NDArray[Any], NDArray[np.uint8] | None]]
) -> Iterator[Packed]:
    """The parts of documents that are given with tokens and mask, without empty ones."""
    for document, ids, mask in documents:
        if (packed := packer.add(document, ids, mask)) is not None:
            yield packed
    if len((packed := packer.finish()).input_ids):
        yield packed


def _cut(
    tokens: NDArray[Any], sequence_length: int, owners: list[Owner], owner_starts: list[int]
) -> Packed:
    """A piece begins where a document or a sequence begins, and ends where the next one does."""
    begins = np.array(owner_starts, np.int64)
    borders = np.arange(0, len(tokens) + 1, sequence_length)
    edges = np.union1d(begins[begins < len(tokens)], borders)
    starts, ends = edges[:-1], edges[1:]
    base = starts - starts % sequence_length
    return Packed(
        input_ids=tokens.reshape(-1, sequence_length),
        piece_offsets=np.searchsorted(starts, borders).astype(np.int32),
        piece_start=(starts - base).astype(np.int32),
        piece_end=(ends - base).astype(np.int32),
        piece_owner=np.searchsorted(begins, starts, side="right") - 1,
        owners=owners,
    )


def tokens_schema(sequence_length: int, dtype: DTypeLike) -> pa.Schema:
    """Columns of a tokens part: `input_ids` and the owners of its positions, `documents`."""
    piece = pa.struct(
        [
            ("id", pa.string()),
            ("source", pa.string()),
            ("start", pa.int32()),
            ("end", pa.int32()),
            ("file", pa.int32()),
            ("row", pa.int64()),
        ]
    )
    ids = pa.list_(pa.from_numpy_dtype(np.dtype(dtype)), sequence_length)
    return pa.schema([("input_ids", ids), ("documents", pa.list_(piece))])


def tokens_table(packed: Packed) -> pa.Table:
    """The Arrow table of a part (`tokens_schema`), made of flat buffers."""
    length = packed.input_ids.shape[1]
    schema = tokens_schema(length, packed.input_ids.dtype)
    piece = schema.field("documents").type.value_type
    owners = pa.Table.from_arrays(
        [
            pa.array([getattr(owner, name) for owner in packed.owners], piece.field(name).type)
            for name in Owner._fields
        ],
        names=list(Owner._fields),
    ).take(pa.array(packed.piece_owner))
    columns = {
        "start": pa.array(packed.piece_start),
        "end": pa.array(packed.piece_end),
    } | {name: owners[name].combine_chunks() for name in Owner._fields}
    pieces = pa.StructArray.from_arrays([columns[f.name] for f in piece], fields=list(piece))
    documents = pa.ListArray.from_arrays(pa.array(packed.piece_offsets), pieces)
    tokens = pa.array(packed.input_ids.reshape(-1))
    table = pa.Table.from_arrays(
        [pa.FixedSizeListArray.from_arrays(tokens, length), documents], schema=schema
    )
    if packed.mask is None:
        return table
    mask = pa.FixedSizeListArray.from_arrays(pa.array(packed.mask.reshape(-1)), length)
    return table.append_column(LOSS_MASK, mask)
