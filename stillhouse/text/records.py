"""Raw rows of files: Parquet, JSON, plain text, or any format by a class of the user's.

The same reader for documents and for the rows of tasks. JSON is a value a line, or one array, or
indented objects one after the other; which of them is recognised by its beginning. Memory holds a
batch of rows, a line or an object. `documents` and `stillhouse.mixing.preparation` check the
values.
"""

import codecs
import io
import json
import re
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from stillhouse.custom_code import CustomCode
from stillhouse.errors import BadFileError, StillhouseError
from stillhouse.storage.filesystem import open_read
from stillhouse.storage.parquet import open_parquet
from stillhouse.text.formats import FILE_ERRORS, READ_BYTES, decoded, format_of, naming_bad_file
from stillhouse.text.values import ABSENT, column_of, find, plain_values
from stillhouse.text.wide_columns import TooLong, wide_column, wide_values

Choose = Callable[[pa.Schema], Sequence[str]]
ALL_ROWS = range(sys.maxsize)
_BATCH_ROWS = 256
_BATCH_BYTES = 16 << 20
_BLANK = b" \t\r\n" + codecs.BOM_UTF8
_BYTES_PER_CHAR = 4  # of UTF-8, at most
_JSON_BYTES_PER_CHAR = 12  # two \uXXXX escapes, a surrogate pair, make one character


@dataclass(frozen=True, slots=True)
class Record:
    """A raw row before any check.

    Attributes:
        row: its number in the file, from 0.
        values: of Parquet the wanted columns by their paths, of JSON the object.
        broken: why it could not be parsed.
        raw: its content then.
    """

    row: int
    values: dict[str, Any] = field(default_factory=dict[str, Any])
    broken: str | None = None
    raw: Any = None


def read_records(
    uri: str,
    choose: Choose,
    *,
    text: str,
    max_chars: int,
    given: str | CustomCode = "auto",
    wanted: Sequence[int] = ALL_ROWS,
) -> Iterator[Record]:
    """The raw rows of a file whose numbers are in `wanted` (a range or a sorted list), in order.

    Args:
        uri: the file.
        choose: the paths to read of a Parquet file, by its schema; may raise InputError.
        text: the key of the text of a plain text file, which is one row.
        max_chars: a longer text is a broken row.
        given: the format, `auto` for that of the suffix; or the user's reader.
        wanted: numbers of rows; default all.

    Raises:
        CustomCodeError: the user's reader raised something else than ValueError or EOFError.
        InputError: an unknown suffix, what `choose` raises.
        BadFileError: a truncated file, one of another format, two columns of one name.
    """
    if isinstance(given, CustomCode):
        with open_read(uri) as raw, naming_bad_file(uri):
            yield from _objects(_custom_rows(given, raw), wanted, "a dictionary")
        return
    kind = format_of(uri, given)
    with open_read(uri) as raw, naming_bad_file(uri):
        kind, stream = decoded(uri, raw, kind)
        if kind == "parquet":
            yield from _parquet_records(stream, choose, wanted, text, max_chars)
        elif kind == "jsonl":
            limit = max_chars * _JSON_BYTES_PER_CHAR + READ_BYTES
            yield from _json_records(stream, limit, wanted)
        elif _overlaps(wanted, 0, 1):
            yield _text_record(stream, text, max_chars)


def _overlaps(wanted: Sequence[int], start: int, stop: int) -> bool:
    """Whether a sorted list (or range) of rows holds one in [start, stop)."""
    position = bisect_left(wanted, start)
    return position < len(wanted) and wanted[position] < stop


def _custom_rows(code: CustomCode, stream: IO[bytes]) -> Iterator[Any]:
    reader = code.build({})
    try:
        yield from reader.read(stream)
    except (StillhouseError, OSError, *FILE_ERRORS):
        raise
    except ValueError as error:
        raise BadFileError(f"{code.name}: {error}") from error
    except Exception as error:
        raise code.failed("failed in `read`", error) from error


# --------------------------------------------------------------------------------------- Parquet


def _parquet_records(
    stream: IO[bytes], choose: Choose, wanted: Sequence[int], text: str, max_chars: int
) -> Iterator[Record]:
    with open_parquet(stream, buffer_size=READ_BYTES) as parquet:
        schema = parquet.schema_arrow
        columns = {path: _column(schema, path) for path in choose(schema)}
        start = 0
        for group in range(parquet.num_row_groups):
            stop = start + parquet.metadata.row_group(group).num_rows
            wide = wide_column(parquet, group, text) if columns.get(text) == text else None
            if _overlaps(wanted, start, stop) and wide is not None:
                values = wide_values(stream, parquet, group, wide, _BYTES_PER_CHAR * max_chars)
                others = {path: column for path, column in columns.items() if path != text}
                batches = parquet.iter_batches(_BATCH_ROWS, [group], columns=[*others])
                rows = _batch_records(batches, others, start, range(start, stop))
                wide_rows = _wide_records(values, rows, text, max_chars)
                yield from (row for row in wide_rows if _overlaps(wanted, row.row, row.row + 1))
            elif _overlaps(wanted, start, stop):
                size = _batch_rows(parquet.metadata.row_group(group), [*columns.values()])
                batches = parquet.iter_batches(size, row_groups=[group], columns=[*columns])
                yield from _batch_records(batches, columns, start, wanted)
            start = stop


def _wide_records(
    values: Iterator[bytes | TooLong | None], rows: Iterator[Record], text: str, max_chars: int
) -> Iterator[Record]:
    """The rows with their long texts, which are read apart."""
    for value, record in zip(values, rows, strict=True):
        if isinstance(value, TooLong):
            yield Record(record.row, broken=too_long(max_chars), raw=value.beginning)
        else:
            yield Record(record.row, record.values | {text: value})


def _column(schema: pa.Schema, path: str) -> str:
    column = column_of(schema, path)
    assert column is not None, "`choose` returns paths that exist"
    if schema.names.count(column) > 1:
        raise BadFileError(f"{schema.names.count(column)} columns are called `{column}`")
    return column


def _batch_rows(group: pq.RowGroupMetaData, columns: list[str]) -> int:
    """Number of rows of about 16 MB."""
    chunks = (group.column(i) for i in range(group.num_columns))
    used = (c for c in chunks if any(f"{c.path_in_schema}.".startswith(f"{n}.") for n in columns))
    num_bytes = sum(chunk.total_uncompressed_size for chunk in used)
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES * group.num_rows // max(num_bytes, 1)))


def _batch_records(
    batches: Iterator[pa.RecordBatch], columns: dict[str, str], start: int, wanted: Sequence[int]
) -> Iterator[Record]:
    for batch in batches:
        if _overlaps(wanted, start, start + batch.num_rows):
            found = [_path_values(batch, path, column) for path, column in columns.items()]
            for row in range(batch.num_rows):
                if _overlaps(wanted, start + row, start + row + 1):
                    cells = (one[row] for one in found)
                    yield Record(start + row, dict(zip(columns, cells, strict=True)))
        start += batch.num_rows


def _path_values(batch: pa.RecordBatch, path: str, column: str) -> list[Any]:
    found = plain_values(batch.column(column))
    if path == column:
        return found
    inner = (find({column: value}, path) for value in found)
    return [None if value is ABSENT else value for value in inner]  # absent in a null struct


# ------------------------------------------------------------------------------------------ JSON


def _json_records(stream: IO[bytes], limit: int, wanted: Sequence[int]) -> Iterator[Record]:
    """The values of an array, of indented objects, or of lines."""
    if _is_array(stream):
        return _objects(_json_values(stream, b"", limit, is_array=True), wanted)
    head: list[bytes] = []
    while sum(map(_is_filled, head)) < 2 and (line := stream.readline(limit)):
        head.append(line)
        if not line.endswith(b"\n"):
            break
    first, *others = [line for line in head if _is_filled(line)] or [b""]
    goes_on = others and not others[0].lstrip().startswith((b"{", b"["))
    if goes_on and first.lstrip(_BLANK).startswith(b"{") and not _is_json(first):
        values = _json_values(stream, b"".join(head), limit, is_array=False)
        return _objects(values, wanted)
    return _lines(stream, head, limit, wanted)


def _is_filled(line: bytes) -> bool:
    return bool(line.strip(_BLANK))


def _is_array(stream: IO[bytes]) -> bool:
    """Whether a file is an array, and not lines the first of which is one."""
    head = cast(io.BufferedReader, stream).peek(READ_BYTES).lstrip(_BLANK)
    line, _, rest = head.partition(b"\n")
    return head.startswith(b"[") and not (rest.strip() and _is_json(line))


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line.strip(_BLANK))
    except (ValueError, RecursionError):
        return False
    return True


def _lines(
    stream: IO[bytes], head: list[bytes], limit: int, wanted: Sequence[int]
) -> Iterator[Record]:
    last = wanted[-1] if wanted else -1
    lines = chain(head, iter(lambda: stream.readline(limit), b""))
    row = -1
    while row < last and (line := next(lines, b"")):
        row += 1
        if len(line) >= limit and not line.endswith(b"\n"):
            while (rest := stream.readline(READ_BYTES)) and not rest.endswith(b"\n"):
                pass
        if _overlaps(wanted, row, row + 1) and _is_filled(line):
            yield _line_record(row, line, limit)


def _line_record(row: int, line: bytes, limit: int) -> Record:
    if len(line) >= limit:
        return Record(row, broken=f"line longer than {limit} bytes (`max_chars`)", raw=line)
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return Record(row, broken="invalid UTF-8", raw=line)
    except (ValueError, RecursionError) as error:
        if line.rstrip().endswith(b"},"):  # an array that lost its brackets
            return _line_record(row, line.rstrip()[:-1], limit)
        return Record(row, broken=f"broken JSON: {error}", raw=line)
    return _object_record(row, value, line)


def _object_record(row: int, value: Any, raw: Any, kind: str = "a JSON object") -> Record:
    if not isinstance(value, dict):
        return Record(row, broken=f"not {kind} but {type(value).__name__}", raw=raw)
    return Record(row, cast(dict[str, Any], value))


def _objects(
    values: Iterator[Any], wanted: Sequence[int], kind: str = "a JSON object"
) -> Iterator[Record]:
    for row, value in enumerate(islice(values, wanted[-1] + 1 if wanted else 0)):
        if _overlaps(wanted, row, row + 1):
            yield _object_record(row, value, value, kind)


_BETWEEN = re.compile(r"[\s,]*")
_UNFINISHED_CHARS = 16  # how far before the end an escape or literal that is cut off begins


def _json_values(stream: IO[bytes], head: bytes, limit: int, *, is_array: bool) -> Iterator[Any]:
    """The values of one array, or values one after the other, whatever their line breaks.

    Raises:
        BadFileError: JSON that is broken or ends too early.
    """
    decode = json.JSONDecoder().raw_decode
    to_text = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    text, at, row, ended = to_text.decode(head).removeprefix("\ufeff"), 0, 0, False
    begun = not is_array
    while True:
        at = cast(re.Match[str], _BETWEEN.match(text, at)).end()
        if not begun and text[at : at + 1] == "[":
            begun, at = True, at + 1
            continue
        if is_array and text[at : at + 1] == "]":
            if text[at + 1 :].strip() or stream.read().strip():
                raise BadFileError("there is more behind its JSON array: write a value a line")
            return
        try:
            value, end = decode(text, at)
        except (json.JSONDecodeError, RecursionError) as error:
            if ended and at == len(text) and not is_array:
                return
            if ended or not _may_go_on(error, len(text)) or len(text) - at > limit:
                raise BadFileError(f"broken JSON in row {row}: {error}") from error
        else:
            if end < len(text) or ended:
                yield value
                at, row = end, row + 1
                continue
        data = stream.read(max(READ_BYTES, len(text) - at))
        text, at, ended = text[at:] + to_text.decode(data, final=not data), 0, not data
        text = text.removeprefix("\ufeff") if not row and not begun else text


def _may_go_on(error: Exception, end: int) -> bool:
    """Whether JSON may be broken only because the rest has not been read yet."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos >= end - _UNFINISHED_CHARS


# ------------------------------------------------------------------------------------ plain text


def _text_record(stream: IO[bytes], key: str, max_chars: int) -> Record:
    data = stream.read(4 * max_chars + 4)  # enough to see that a text is too long
    if len(data) > 4 * max_chars + 3:
        return Record(0, broken=too_long(max_chars, is_file=True), raw=data)
    try:
        found = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return Record(0, broken="invalid UTF-8", raw=data)
    if len(found) > max_chars:
        return Record(0, broken=too_long(max_chars, is_file=True), raw=found)
    return Record(0, {key: found})


def too_long(max_chars: int, *, is_file: bool = False) -> str:
    """Why a text is left out."""
    reason = f"longer than {max_chars} characters"
    return f"{reason} (`max_chars`), a plain text file is one document" if is_file else reason
