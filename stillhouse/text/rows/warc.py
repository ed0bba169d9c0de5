"""WARC, as Common Crawl and other archives have it: the texts of pages.

A row is a record; those without a page's text are passed over, but have numbers:

* `conversion` (WET files) of plain text: its text;
* `response` with a status of 2xx, and `resource`: plain text, decoded by its charset, or of HTML
  the main content, as `resiliparse` extracts it: without menus, scripts and the like. A page
  in which it finds none is a bad row, `empty text`.

Columns: `text`, `url`, `date` (of the crawl) and `id` (that of the record). Memory holds a record.
"""

import codecs
import io
import re
from collections.abc import Iterator
from typing import IO, Any

import pyarrow as pa
from resiliparse.extract.html2text import extract_plain_text  # pyright: ignore
from resiliparse.parse.encoding import bytes_to_str, detect_encoding  # pyright: ignore
from warcio.archiveiterator import WARCIterator  # pyright: ignore
from warcio.exceptions import ArchiveLoadFailed  # pyright: ignore

from stillhouse.errors import BadFileError
from stillhouse.text.rows.record import READ_BYTES, Record, Wanted, too_long

SCHEMA = pa.schema([(name, pa.string()) for name in ("text", "url", "date", "id")])
_HEADERS = {"url": "WARC-Target-URI", "date": "WARC-Date", "id": "WARC-Record-ID"}
_BYTES_PER_CHAR = 4
_CHARSET = re.compile(r"charset=[\"']?([\w.:-]+)", re.IGNORECASE)
_HTML = ("text/html", "application/xhtml+xml")


def read(stream: IO[bytes], wanted: Wanted) -> Iterator[Record]:
    """The wanted records with a page's text.

    Raises:
        BadFileError: it is no WARC file, or cut off.
    """
    columns = wanted.columns(SCHEMA)
    whole = _Tail(stream)
    records: Any = iter(WARCIterator(whole))
    row = -1
    while row < wanted.last:
        try:
            record = next(records, None)
        except ArchiveLoadFailed as error:
            raise BadFileError(f"no WARC record begins behind record {row}: {error}") from error
        if record is None:
            if whole.tail and not whole.tail.endswith(b"\n\r\n"):
                raise BadFileError(f"cut off: it ends in the middle of record {row + 1}")
            return
        row += 1
        kind = _kind(record)
        if kind is not None and wanted.overlaps(row, row + 1):
            yield _row(row, record, kind, columns, wanted.max_chars)
        while record.raw_stream.read(READ_BYTES):
            pass
        if getattr(record.raw_stream, "limit", 1) > 0:  # without one, its header is cut off
            raise BadFileError(f"cut off: it ends in the middle of record {row}")


class _Tail(io.RawIOBase):
    """A stream that remembers the end of what was read."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self.tail = stream, b""

    def read(self, size: int = -1, /) -> bytes:
        try:
            data = self._stream.read(size)
        except EOFError as error:  # which warcio takes for the end of the file
            raise BadFileError(str(error)) from error
        self.tail = data[-4:] if len(data) >= 4 else (self.tail + data)[-4:]
        return data


def _kind(record: Any) -> str | None:
    """The media type of a page's text; None for other records."""
    headers = record.rec_headers
    if record.rec_type == "response":
        headers = record.http_headers
        if headers is None or not str(headers.get_statuscode()).startswith("2"):
            return None
    elif record.rec_type not in ("conversion", "resource"):
        return None
    kind = (headers.get_header("Content-Type") or "").partition(";")[0].strip().lower()
    return kind if kind == "text/plain" or kind in _HTML else None


def _row(row: int, record: Any, kind: str, columns: dict[str, str], max_chars: int) -> Record:
    limit = max_chars * _BYTES_PER_CHAR + READ_BYTES
    data: bytes = record.content_stream().read(limit)
    if len(data) >= limit:
        return Record(row, broken=too_long(max_chars), raw=data)
    values: dict[str, Any] = {
        name: (record.rec_headers.get_header(header) or "").strip("<>") or None
        for name, header in _HEADERS.items()
    }
    values["text"] = _text(record, kind, data)
    return Record(row, {path: values[column] for path, column in columns.items()})


def _text(record: Any, kind: str, data: bytes) -> str | bytes:
    headers = record.http_headers or record.rec_headers
    charset = _CHARSET.search(headers.get_header("Content-Type") or "")
    named = charset[1] if charset and _is_known(charset[1]) else None
    if kind in _HTML:
        encoding = named or str(detect_encoding(data, from_html_meta=True))
        return extract_plain_text(bytes_to_str(data, encoding), main_content=True)
    return bytes_to_str(data, named) if named else data


def _is_known(encoding: str) -> bool:
    try:
        codecs.lookup(encoding)
    except LookupError:
        return False
    return True
