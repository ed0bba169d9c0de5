"""Raw rows of files, by format: what Parquet, JSON Lines and plain text hold before any check.

Formats go by suffix, `.gz` and `.zst` are taken off JSON Lines and text. Memory holds a batch of
rows or one line. What lies in a row is judged by `documents`; here only files can be bad.
"""

import gzip
import io
import json
import zlib
from bisect import bisect_left
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import IO, Any, Literal, cast

import pyarrow as pa

from stillhouse.errors import BadFileError, InputError
from stillhouse.spec import DataSource
from stillhouse.storage.filesystem import open_read
from stillhouse.storage.parquet import open_parquet

Format = Literal["parquet", "jsonl", "text"]
SUFFIXES: dict[str, Format] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
}
_COMPRESSIONS = (".gz", ".zst")
_KEYS_CHARS = 200
_BATCH_ROWS = 256
_READ_BYTES = 1 << 20
_JSON_BYTES_PER_CHAR = 12  # two \uXXXX escapes, a surrogate pair, make one character


@dataclass(frozen=True, slots=True)
class Record:
    """A raw row before any check; `broken` says why it could not even be parsed."""

    row: int
    text: Any
    id: Any = None
    source: Any = None
    broken: str | None = None


def listed_suffixes(*wanted: Format) -> tuple[str, ...]:
    """The suffixes of the files of some formats that a folder is read for.

    A plain `.json` beside data is mostly about them; it is read where a path or glob names it.
    """
    suffixes = [name for name, kind in SUFFIXES.items() if kind in wanted]
    listed = [s + c for s in suffixes for c in ("", *_COMPRESSIONS)]
    return tuple(suffix for suffix in listed if suffix != ".json")


def format_of(uri: str, settings: DataSource) -> Format:
    """The format of a file, by `settings.format` or else by its suffix (in any case).

    Raises:
        InputError: a suffix that says nothing, under `format: auto`.
    """
    if settings.format != "auto":
        return settings.format
    name = uri.lower()
    for compression in _COMPRESSIONS:
        name = name.removesuffix(compression)
    for suffix, kind in SUFFIXES.items():
        if name.endswith(suffix):
            return kind
    raise InputError(f"{uri}: unknown suffix; known are {', '.join(SUFFIXES)}; or set `format`")


def read_records(uri: str, settings: DataSource, wanted: Sequence[int]) -> Iterator[Record]:
    """The raw rows of a file whose numbers are in `wanted` (a range or a sorted list), in order.

    Raises:
        InputError: a named column that is missing, an unknown suffix.
        BadFileError: a truncated file, or one of another format.
    """
    kind = format_of(uri, settings)
    with open_read(uri) as stream, naming_bad_file(uri):
        if kind == "parquet":
            yield from _parquet_records(uri, stream, settings, wanted)
        elif kind == "jsonl":
            yield from _json_records(decompressed(uri, stream), settings, wanted)
        elif _overlaps(wanted, 0, 1):
            yield _text_record(decompressed(uri, stream), settings.max_chars)


@contextmanager
def naming_bad_file(uri: str) -> Generator[None]:
    """Errors of parsers and decompressors become BadFileError; those of storage pass."""
    try:
        yield
    except (pa.ArrowException, EOFError, zlib.error) as error:
        raise BadFileError(_bad_file(uri, error)) from error
    except OSError as error:
        if error.errno is not None:  # the operating system or the store speaks, not a parser
            raise
        raise BadFileError(_bad_file(uri, error)) from error


def _bad_file(uri: str, error: Exception) -> str:
    cause = (str(error) or type(error).__name__).splitlines()[0][:200]
    return f"{uri}: cannot be read: {cause}; repair it, or set `skip_bad_files: true`"


def _overlaps(wanted: Sequence[int], start: int, stop: int) -> bool:
    """Whether a sorted list (or range) of rows holds one in [start, stop)."""
    position = bisect_left(wanted, start)
    return position < len(wanted) and wanted[position] < stop


def _parquet_records(
    uri: str, stream: IO[bytes], settings: DataSource, wanted: Sequence[int]
) -> Iterator[Record]:
    with open_parquet(stream, buffer_size=_READ_BYTES) as parquet:
        names = _parquet_columns(uri, parquet.schema_arrow.names, settings)
        used = [name for name in dict.fromkeys(names) if name is not None]
        start = 0
        for group in range(parquet.num_row_groups):
            stop = start + parquet.metadata.row_group(group).num_rows
            if _overlaps(wanted, start, stop):
                batches = parquet.iter_batches(_BATCH_ROWS, row_groups=[group], columns=used)
                yield from _batch_records(batches, names, start, wanted)
            start = stop


def _parquet_columns(
    uri: str, existing: list[str], settings: DataSource
) -> tuple[str, str | None, str | None]:
    """The columns of text, id and source; None where there is none and none was named."""
    asked = settings.columns
    for key in ("text", "id", "source"):
        column = getattr(asked, key)
        if column is not None and column not in existing:
            near = get_close_matches(column, existing, n=1)
            hint = f"; did you mean `{near[0]}`" if near else ""
            raise InputError(
                f"{uri}: no column `{column}` (`columns.{key}`){hint}. It has {', '.join(existing)}"
            )
    default_id = "id" if "id" in existing else None
    default_source = "source" if "source" in existing else None
    return asked.text, asked.id or default_id, asked.source or default_source


def _batch_records(
    batches: Iterator[pa.RecordBatch],
    names: tuple[str, str | None, str | None],
    start: int,
    wanted: Sequence[int],
) -> Iterator[Record]:
    for batch in batches:
        if _overlaps(wanted, start, start + batch.num_rows):
            nothing = [None] * batch.num_rows
            columns = [_values(batch.column(name)) if name else nothing for name in names]
            for row, (text, id_, source) in enumerate(zip(*columns, strict=True), start):
                if _overlaps(wanted, row, row + 1):
                    yield Record(row, text, id_, source)
        start += batch.num_rows


def _values(column: pa.Array) -> list[Any]:
    """Python values; strings that are not UTF-8 come back as bytes."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return column.cast(pa.large_binary()).to_pylist()


def decompressed(uri: str, stream: IO[bytes]) -> IO[bytes]:
    """The stream without the compression that the file's suffix names."""
    name = uri.lower()
    if name.endswith(".gz"):
        return cast(IO[bytes], gzip.GzipFile(fileobj=stream))
    if name.endswith(".zst"):  # Arrow's reader, because it notices a truncated stream
        raw = cast(io.RawIOBase, pa.CompressedInputStream(pa.PythonFile(stream, "r"), "zstd"))
        return io.BufferedReader(raw, _READ_BYTES)
    return stream


def _json_records(
    stream: IO[bytes], settings: DataSource, wanted: Sequence[int]
) -> Iterator[Record]:
    limit = settings.max_chars * _JSON_BYTES_PER_CHAR + _READ_BYTES
    last = wanted[-1] if wanted else -1
    row = -1
    while row < last and (line := stream.readline(limit)):
        row += 1
        complete = len(line) < limit or line.endswith(b"\n")
        while not complete:
            rest = stream.readline(_READ_BYTES)
            complete = not rest or rest.endswith(b"\n")
        if _overlaps(wanted, row, row + 1) and line.strip():
            yield _json_record(row, line, limit, settings)


def _json_record(row: int, line: bytes, limit: int, settings: DataSource) -> Record:
    if len(line) >= limit:
        return Record(row, line, broken=f"line longer than {limit} bytes (`max_chars`)")
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return Record(row, line, broken="invalid UTF-8")
    except (ValueError, RecursionError) as error:
        return Record(row, line, broken=f"broken JSON: {error}")
    columns = settings.columns
    if not isinstance(value, dict):
        return Record(row, line, broken=f"not a JSON object but {type(value).__name__}")
    if columns.text not in value:
        keys = ", ".join(map(str, value))[:_KEYS_CHARS]
        return Record(row, line, broken=f"no key `{columns.text}`; keys: {keys}")
    id_, source = value.get(columns.id or "id"), value.get(columns.source or "source")
    return Record(row, value[columns.text], id_, source)


def _text_record(stream: IO[bytes], max_chars: int) -> Record:
    data = stream.read(4 * max_chars + 4)  # enough to see that a text is too long
    if len(data) > 4 * max_chars + 3:
        return Record(0, data, broken=f"longer than {max_chars} characters")
    try:
        return Record(0, data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return Record(0, data, broken="invalid UTF-8")
