"""Documents out of files: Parquet, JSON and plain text, row by row.

A row that cannot be used becomes a `DeadLetter` with its address and reason; a file that cannot be
read raises `BadFileError`. Memory holds a batch of rows or one line, never a whole file. Rows are
numbered as they lie in the file, from 0; a blank JSON line is no document, but has a number.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import pyarrow as pa

from stillhouse.errors import BadFileError, InputError
from stillhouse.spec import DataSource
from stillhouse.text.records import ALL_ROWS, Record, read_records, too_long
from stillhouse.text.values import (
    ABSENT,
    as_text,
    column_of,
    column_paths,
    find,
    key_paths,
    label,
    text_fault,
)

_KEYS_CHARS = 200
_PREVIEW_CHARS = 200


@dataclass(frozen=True, slots=True)
class Document:
    """One usable text: raw file index, raw row, id, source label, text (valid Unicode).

    `absent` says which key that the spec names its row lacks, or is empty.
    """

    file: int
    row: int
    id: str
    source: str
    text: str
    absent: str = ""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One row that was left out: its address, why, and its first 200 characters."""

    file: int
    row: int
    reason: str
    preview: str


def read_documents(
    uri: str,
    *,
    file: int,
    name: str,
    settings: DataSource,
    rows: tuple[int, int] | None = None,
    label: str | None = None,
) -> Iterator[Document | DeadLetter]:
    """Every document or dead letter of a file in order.

    Args:
        uri: the file.
        file: its index in the sorted listing, copied into the results.
        name: its path relative to the listing; `name:row` is the id of rows without one.
        settings: format, columns, default source, longest text.
        rows: half-open range of raw rows; default all.
        label: the source of all rows; default what the rows say.

    Raises:
        InputError: a named column that is missing, an unknown suffix.
        BadFileError: a truncated file, or one of another format.
    """
    wanted = range(*rows) if rows else ALL_ROWS
    yield from _read(uri, wanted, file, name, settings, label)


def read_rows(
    uri: str,
    rows: Sequence[int],
    *,
    file: int,
    name: str,
    settings: DataSource,
    label: str | None = None,
) -> Iterator[Document]:
    """The documents at the given raw rows (sorted) of a file; the rest as in `read_documents`."""
    for document in _read(uri, rows, file, name, settings, label):
        if isinstance(document, Document):
            yield document


def _read(
    uri: str,
    wanted: Sequence[int],
    file: int,
    name: str,
    settings: DataSource,
    label: str | None,
) -> Iterator[Document | DeadLetter]:
    keys = _labels(label)
    records = read_records(
        uri,
        lambda schema: _parquet_columns(uri, schema, settings, ("text", *keys)),
        text=settings.columns.text,
        max_chars=settings.max_chars,
        given=settings.format,
        wanted=wanted,
    )
    try:
        for record in records:
            yield _judge(record, file, name, settings, label)
    except BadFileError as error:
        raise BadFileError(f"{error}; repair it, or set `skip_bad_files: true`") from error


def _parquet_columns(
    uri: str, schema: pa.Schema, settings: DataSource, keys: Sequence[str]
) -> list[str]:
    """The columns of text, id and source that a file has."""
    asked = settings.columns.model_dump(include=set(keys))
    for key, path in asked.items():
        if path is not None and column_of(schema, path) is None:
            paths = column_paths(schema)
            near = get_close_matches(path, paths, n=1)
            hint = f"; did you mean `{near[0]}`" if near else ""
            names = ", ".join(paths)
            raise InputError(f"{uri}: no column `{path}` (`columns.{key}`){hint}. It has {names}")
    paths = [path or key for key, path in asked.items()]
    return [path for path in dict.fromkeys(paths) if column_of(schema, path) is not None]


def _judge(
    record: Record, file: int, name: str, settings: DataSource, given: str | None
) -> Document | DeadLetter:
    """The document of a raw row, or why there is none."""
    columns, values = settings.columns, record.values
    raw = find(values, columns.text)
    text = as_text(record.raw if record.broken else raw)
    try:
        reason = record.broken or _fault(text, record, settings)
        id_ = _label(values, "id", columns.id) or f"{name}:{record.row}"
        source = given or _label(values, "source", columns.source) or settings.source or "unknown"
    except ValueError as error:
        reason, id_, source = str(error), "", ""
    if reason is not None:
        return DeadLetter(file, record.row, _clean(reason), _preview(text))
    absent = _absent(record, settings, _labels(given))
    return Document(file, record.row, id_, source, text, absent)


def _labels(given: str | None) -> tuple[str, ...]:
    """What is read beside the text; the source is not where it is given."""
    return ("id",) if given else ("id", "source")


def _label(values: dict[str, Any], key: str, path: str | None) -> str:
    try:
        return label(find(values, path or key))
    except ValueError as error:
        raise ValueError(
            f"`{path or key}` is {error}: name another one (`columns.{key}`), a key of an object "
            "as `a.b`"
        ) from error


def _absent(record: Record, settings: DataSource, keys: Sequence[str]) -> str:
    """Of id and source, the key that the spec names and an object lacks."""
    for key in keys:
        path = getattr(settings.columns, key)
        if path is not None and find(record.values, path) is ABSENT:
            return f"no key `{path}` (`columns.{key}`); keys: {_keys(record)}"
    return ""


def _keys(record: Record) -> str:
    return ", ".join(key_paths(record.values))[:_KEYS_CHARS]


def _fault(text: Any, record: Record, settings: DataSource) -> str | None:
    if text is ABSENT:
        return f"no key `{settings.columns.text}`; keys: {_keys(record)}"
    if text is None:
        return "null text"
    fault = text_fault("text", text)
    if fault is not None:
        return fault
    if len(text) > settings.max_chars:
        return too_long(settings.max_chars)
    return "empty text" if not text or text.isspace() else None


def _clean(text: str) -> str:
    return text.encode(errors="replace").decode()


def _preview(text: Any) -> str:
    if isinstance(text, bytes):
        text = text[: 4 * _PREVIEW_CHARS].decode(errors="replace")
    return "" if text is None else _clean(str(text)[:_PREVIEW_CHARS])
