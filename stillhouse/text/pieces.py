"""Token parts as arrays: the ids, and the pieces of documents as flat columns."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stillhouse.errors import ArtifactError

if TYPE_CHECKING:  # specs are read without tokenizers
    from stillhouse.text.tokenizer import Tokenizer

Grain = Literal["sequences", "documents"]
LOSS_MASK = "loss_mask"
"""The column of tokens that losses count: 0 or 1 for each of T positions."""
LABELLED: tuple[Grain, ...] = ("sequences", "documents")
LABELS_SCHEMA = pa.schema(
    [("label", pa.string()), ("tokens", pa.int64())] + [(g, pa.int64()) for g in LABELLED]
)


@dataclass(frozen=True, slots=True)
class Pieces:
    """The p pieces of documents in n sequences, in order.

    Attributes:
        sequence: int64 [p], the sequence that a piece lies in.
        start, end: int32 [p], the positions it owns.
        file, row: int32 and int64 [p], the raw file (of the unit) and row of its document.
        source: int32 [p], index into `sources`.
        sources: the labels that occur, in order of first occurrence.
        ids: the documents' ids.
        offsets: int64 [n + 1], pieces of sequence i are [offsets[i], offsets[i + 1]).
    """

    sequence: NDArray[np.int64]
    start: NDArray[np.int32]
    end: NDArray[np.int32]
    file: NDArray[np.int32]
    row: NDArray[np.int64]
    source: NDArray[np.int32]
    sources: list[str]
    ids: pa.Array
    offsets: NDArray[np.int64]

    @property
    def num_tokens(self) -> NDArray[np.int64]:
        return (self.end - self.start).astype(np.int64)

    def owners(self) -> NDArray[np.int64]:
        """int64 [p], the number of the document of each piece: 0, 1, 2, ... in order."""
        first = np.ones(len(self.file), np.bool_)
        first[1:] = (np.diff(self.file) != 0) | (np.diff(self.row) != 0)
        return np.cumsum(first) - 1


def token_ids(table: pa.Table) -> NDArray[Any]:
    """`input_ids` [n, T] in the type they are stored in, without a copy where possible.

    Raises:
        ArtifactError: lists of different lengths, nulls.
    """
    column = table["input_ids"].combine_chunks()
    if column.null_count or column.flatten().null_count:
        raise ArtifactError("`input_ids` has nulls: remove these rows")
    if pa.types.is_fixed_size_list(column.type):
        lengths = np.array([column.type.list_size])
    else:
        lengths = np.unique(column.value_lengths().to_numpy(zero_copy_only=False))
    if len(lengths) != 1:
        raise ArtifactError(f"sequences of {lengths.min()} to {lengths.max()} tokens: need one T")
    return column.flatten().to_numpy(zero_copy_only=False).reshape(-1, lengths[0])


def read_pieces(table: pa.Table) -> Pieces:
    """The pieces of all sequences of a token part (or of a selection)."""
    column = table["documents"].combine_chunks()
    flat = column.flatten()
    lengths = column.value_lengths().to_numpy(zero_copy_only=False)
    sources = flat.field("source").dictionary_encode()
    return Pieces(
        sequence=np.repeat(np.arange(len(column)), lengths),
        start=flat.field("start").to_numpy(zero_copy_only=False),
        end=flat.field("end").to_numpy(zero_copy_only=False),
        file=flat.field("file").to_numpy(zero_copy_only=False),
        row=flat.field("row").to_numpy(zero_copy_only=False),
        source=sources.indices.to_numpy(zero_copy_only=False).astype(np.int32),
        sources=sources.dictionary.to_pylist(),
        ids=flat.field("id"),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )


def with_piece_fields(table: pa.Table, fields: Mapping[str, pa.Array]) -> pa.Table:
    """The table with fields of the pieces in `documents` added or replaced, an array [p] each."""
    column = table["documents"].combine_chunks()
    flat = column.flatten()
    fields = {field.name: flat.field(field.name) for field in flat.type} | {**fields}
    offsets = np.concatenate([[0], np.cumsum(column.value_lengths().to_numpy())]).astype(np.int32)
    structs = pa.StructArray.from_arrays([*fields.values()], names=[*fields])
    index = table.column_names.index("documents")
    return table.set_column(index, "documents", pa.ListArray.from_arrays(offsets, structs))


def row_texts(
    table: pa.Table, pieces: Pieces, row: int, grain: str, tokenizer: "Tokenizer"
) -> tuple[str, str, str]:
    """Text, source and document id of a row (a sequence or a document) of a token part.

    Source and id are those of the piece with most tokens.
    """
    ids = token_ids(table)
    length = ids.shape[1]
    if grain == "documents":
        mine = np.flatnonzero(pieces.owners() == row)
        begin = pieces.sequence[mine[0]] * length + pieces.start[mine[0]]
        end = pieces.sequence[mine[-1]] * length + pieces.end[mine[-1]]
        tokens = ids.reshape(-1)[begin:end]
    else:
        mine = np.arange(pieces.offsets[row], pieces.offsets[row + 1])
        tokens = ids[row]
    largest = int(mine[np.argmax(pieces.num_tokens[mine])])
    source = pieces.sources[pieces.source[largest]]
    return tokenizer.decode(tokens), source, pieces.ids[largest].as_py()


def row_sources(pieces: Pieces, grain: Grain) -> NDArray[np.int32]:
    """int32 [n], the index in `pieces.sources` of the source with most tokens of each row.

    A row is a sequence or a document. Of equal shares the first in `sources` counts.
    """
    row = pieces.owners() if grain == "documents" else pieces.sequence
    count = int(row[-1]) + 1 if len(row) else 0
    width = len(pieces.sources)
    if grain == "documents":
        first = np.searchsorted(row, np.arange(count))
        return pieces.source[first]
    key = row * width + pieces.source
    used, place = np.unique(key, return_inverse=True)
    tokens = np.bincount(place, pieces.num_tokens)
    order = np.lexsort((used, -tokens, used // width))
    firsts = order[np.flatnonzero(np.diff(used[order] // width, prepend=-1))]
    return (used[firsts] % width).astype(np.int32)


def label_table(pieces: Pieces) -> pa.Table:
    """Tokens and rows of each source (`LABELS_SCHEMA`); a row counts for the source with most of
    its tokens.
    """
    width = len(pieces.sources)
    tokens = np.bincount(pieces.source, pieces.num_tokens, width).astype(np.int64)
    counts = [np.bincount(row_sources(pieces, g), minlength=width) for g in LABELLED]
    columns = [pa.array(pieces.sources, pa.string()), pa.array(tokens), *map(pa.array, counts)]
    return pa.Table.from_arrays(columns, schema=LABELS_SCHEMA)
