"""Documents out of files: Parquet, JSON Lines (plain, gz, zst) and plain text, row by row.

A row that cannot be used becomes a `DeadLetter` with its address and reason; a file that cannot be
read raises `BadFileError`. Memory holds a batch of rows or one line, never a whole file. Rows are
numbered as they lie in the file, from 0; a blank JSON line is no document, but has a number.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from stillhouse.spec import DataSource
from stillhouse.text.records import Record, read_records

_PREVIEW_CHARS = 200


@dataclass(frozen=True, slots=True)
class Document:
    """One usable text: raw file index, raw row, id, source label, text (valid Unicode)."""

    file: int
    row: int
    id: str
    source: str
    text: str


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
) -> Iterator[Document | DeadLetter]:
    """Every document or dead letter of a file in order.

    Args:
        uri: the file.
        file: its index in the sorted listing, copied into the results.
        name: its path relative to the listing; `name:row` is the id of rows without one.
        settings: format, columns, default source, longest text.
        rows: half-open range of raw rows; default all.

    Raises:
        InputError: a named column that is missing, an unknown suffix.
        BadFileError: a truncated file, or one of another format.
    """
    wanted = range(*rows) if rows else range(sys.maxsize)
    for record in read_records(uri, settings, wanted):
        yield _judge(record, file, name, settings)


def read_rows(
    uri: str, rows: Sequence[int], *, file: int, name: str, settings: DataSource
) -> Iterator[Document]:
    """The documents at the given raw rows (sorted) of a file; errors as in `read_documents`."""
    for record in read_records(uri, settings, rows):
        document = _judge(record, file, name, settings)
        if isinstance(document, Document):
            yield document


def _judge(record: Record, file: int, name: str, settings: DataSource) -> Document | DeadLetter:
    """The document of a raw row, or why there is none."""
    text = _decoded(record.text)
    reason = record.broken or _fault(text, settings.max_chars)
    if reason is not None:
        return DeadLetter(file, record.row, _clean(reason), _preview(text))
    id_ = _label(record.id) or f"{name}:{record.row}"
    source = _label(record.source) or settings.source or "unknown"
    return Document(file, record.row, id_, source, text)


def _decoded(text: Any) -> Any:
    """Bytes as text where they are UTF-8: a Parquet column without the string mark."""
    try:
        return text.decode() if isinstance(text, bytes) else text
    except UnicodeDecodeError:
        return text


def _fault(text: Any, max_chars: int) -> str | None:
    if text is None:
        return "null text"
    if isinstance(text, bytes):
        return "invalid UTF-8"
    if not isinstance(text, str):
        return f"text is not a string but {type(text).__name__}"
    if len(text) > max_chars:
        return f"longer than {max_chars} characters"
    if not text or text.isspace():
        return "empty text"
    return None if _is_unicode(text) else "invalid Unicode (lone surrogate)"


def _is_unicode(text: str) -> bool:
    """False for lone surrogates, which JSON can spell but UTF-8 cannot hold."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def _label(value: Any) -> str:
    """A string or whole number as a label; "" for everything else."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) and _is_unicode(value) else ""


def _clean(text: str) -> str:
    return text.encode(errors="replace").decode()


def _preview(text: Any) -> str:
    if isinstance(text, bytes):
        text = text[: 4 * _PREVIEW_CHARS].decode(errors="replace")
    return "" if text is None else _clean(str(text)[:_PREVIEW_CHARS])
