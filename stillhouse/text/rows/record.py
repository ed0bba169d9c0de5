"""What readers of all formats take and give: raw rows, and which of them are wanted."""

import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, cast

import pyarrow as pa

from stillhouse.errors import BadFileError
from stillhouse.text.values import ABSENT, column_of, find, plain_values

Choose = Callable[[pa.Schema], Sequence[str]]
ALL_ROWS = range(sys.maxsize)
BATCH_ROWS = 256
BATCH_BYTES = 16 << 20
READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Record:
    """A raw row before any check.

    Attributes:
        row: its number in the file, from 0.
        values: of formats with columns the wanted ones by their paths, of JSON the object.
        broken: why it could not be parsed.
        raw: its content then.
    """

    row: int
    values: dict[str, Any] = field(default_factory=dict[str, Any])
    broken: str | None = None
    raw: Any = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is wanted of a file.

    Attributes:
        rows: their numbers, a range or a sorted list.
        choose: the paths to read of a format with columns, by its schema; may raise InputError.
        text: the path of the text; in plain text, the key of the only value.
        max_chars: a longer text is a broken row.
    """

    rows: Sequence[int]
    choose: Choose
    text: str
    max_chars: int

    def overlaps(self, start: int, stop: int) -> bool:
        """Whether a row in [start, stop) is wanted."""
        position = bisect_left(self.rows, start)
        return position < len(self.rows) and self.rows[position] < stop

    @property
    def last(self) -> int:
        """The last row, -1 where there is none."""
        return self.rows[-1] if self.rows else -1

    def columns(self, schema: pa.Schema) -> dict[str, str]:
        """The columns that hold the chosen paths.

        Raises:
            BadFileError: two columns of one name. InputError: what `choose` raises.
        """
        return {path: _column(schema, path) for path in self.choose(schema)}


def _column(schema: pa.Schema, path: str) -> str:
    column = column_of(schema, path)
    assert column is not None, "`choose` returns paths that exist"
    if schema.names.count(column) > 1:
        raise BadFileError(f"{schema.names.count(column)} columns are called `{column}`")
    return column


def batch_records(
    batches: Iterator[pa.RecordBatch], columns: dict[str, str], start: int, wanted: Wanted
) -> Iterator[Record]:
    """The wanted rows of Arrow batches, the first of which begins at row `start`."""
    for batch in batches:
        if wanted.overlaps(start, start + batch.num_rows):
            found = [_path_values(batch, path, column) for path, column in columns.items()]
            for row in range(batch.num_rows):
                if wanted.overlaps(start + row, start + row + 1):
                    cells = (one[row] for one in found)
                    yield Record(start + row, dict(zip(columns, cells, strict=True)))
        start += batch.num_rows


def _path_values(batch: pa.RecordBatch, path: str, column: str) -> list[Any]:
    found = plain_values(batch.column(column))
    if path == column:
        return found
    inner = (find({column: value}, path) for value in found)
    return [None if value is ABSENT else value for value in inner]  # absent in a null struct


def object_records(
    values: Iterator[Any], wanted: Wanted, kind: str = "a JSON object"
) -> Iterator[Record]:
    """The wanted ones of values, which should be objects."""
    for row, value in enumerate(islice(values, wanted.last + 1)):
        if wanted.overlaps(row, row + 1):
            yield object_record(row, value, value, kind)


def object_record(row: int, value: Any, raw: Any, kind: str = "a JSON object") -> Record:
    """A value as a row."""
    if not isinstance(value, dict):
        return Record(row, broken=f"not {kind} but {type(value).__name__}", raw=raw)
    return Record(row, cast(dict[str, Any], value))


def too_long(max_chars: int, *, is_file: bool = False) -> str:
    """Why a text is left out."""
    reason = f"longer than {max_chars} characters"
    return f"{reason} (`max_chars`), a plain text file is one document" if is_file else reason
