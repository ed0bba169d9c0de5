"""CSV and TSV: a header row with the columns' names, then a row a line, or more where quoted.

Quotes are those of RFC 4180, in TSV too. All values are text. Row 0 is the first after the header;
empty lines have numbers. A row with more or fewer fields than the header, with text behind a
closing quote, or of no valid UTF-8 is a bad row. Memory holds a row, of a longer one its beginning.
"""

import codecs
import csv
import re
import sys
from collections.abc import Iterator
from typing import IO

import pyarrow as pa

from stillhouse.errors import BadFileError, InputError
from stillhouse.text.rows.record import READ_BYTES, Record, Wanted
from stillhouse.text.values import is_unicode

_BYTES_PER_CHAR = 4


def read_commas(stream: IO[bytes], wanted: Wanted) -> Iterator[Record]:
    """The wanted rows of a CSV file."""
    return _Delimited(stream, wanted, ",").records()


def read_tabs(stream: IO[bytes], wanted: Wanted) -> Iterator[Record]:
    """The wanted rows of a TSV file."""
    return _Delimited(stream, wanted, "\t").records()


class _Delimited:
    def __init__(self, stream: IO[bytes], wanted: Wanted, delimiter: str) -> None:
        self._stream, self._wanted, self._delimiter = stream, wanted, delimiter
        self._limit = wanted.max_chars * _BYTES_PER_CHAR + READ_BYTES
        self._plain = re.compile(rb'[^"\r\n%s]{2,}' % delimiter.encode())
        self._start, self._num_bytes, self._is_at_end = b"", 0, False

    def records(self) -> Iterator[Record]:
        csv.field_size_limit(sys.maxsize)  # rows have a limit here
        rows = csv.reader(self._lines(), delimiter=self._delimiter, strict=True)
        header, broken = self._next(rows)
        if broken is not None:
            raise BadFileError(f"its first row, which has the names of the columns: {broken}")
        if header is None:
            return
        schema = pa.schema([(name, pa.string()) for name in header])
        try:
            columns = self._wanted.columns(schema)
        except InputError as error:
            if isinstance(error, BadFileError):
                raise
            raise InputError(f"{error} (the first row, which has the names of columns)") from error
        places = {path: header.index(column) for path, column in columns.items()}
        row = -1
        while row < self._wanted.last:
            cells, broken = self._next(rows)
            if cells is None and broken is None:
                return
            row += 1
            if not self._wanted.overlaps(row, row + 1) or cells == []:
                continue
            if cells is not None and len(cells) != len(header):
                broken = f"{len(cells)} fields; the header has {len(header)}"
            if broken is None and cells is not None:
                values = {path: cells[place] for path, place in places.items()}
                if all(map(is_unicode, values.values())):
                    yield Record(row, values)
                    continue
                broken = "invalid UTF-8"
            yield Record(row, broken=broken, raw=self._start)

    def _next(self, rows: Iterator[list[str]]) -> tuple[list[str] | None, str | None]:
        """The fields of the next row, or why it has none; nothing at the end.

        Raises:
            BadFileError: a quote that is never closed: how many rows are behind it is unknown.
        """
        self._start, self._num_bytes = b"", 0
        try:
            cells = next(rows, None)
        except csv.Error as error:
            if self._is_at_end:
                begins = self._start[:50].decode(errors="replace")
                raise BadFileError(f"a quote is never closed, in the row {begins!r}") from error
            return None, f"broken CSV: {error}"
        if self._num_bytes > self._limit:
            return None, f"row longer than {self._limit} bytes (`max_chars`)"
        return cells, None

    def _lines(self) -> Iterator[str]:
        """The lines of the file; in a row that is too long, what decides where it ends."""
        is_first = True
        while line := self._stream.readline(self._limit):
            if is_first:
                line, is_first = line.removeprefix(codecs.BOM_UTF8), False
            self._start = self._start or line
            self._num_bytes += len(line)
            if len(line) >= self._limit and not line.endswith(b"\n"):
                line = self._plain.sub(b"x", line)
                while not line.endswith(b"\n") and (rest := self._stream.readline(self._limit)):
                    self._num_bytes += len(rest)
                    line += self._plain.sub(b"x", rest)
            elif self._num_bytes > self._limit:  # inside quotes, since a line begins there
                line = self._plain.sub(b"x", line) if b'"' in line else b""
            yield line.decode("utf-8", "surrogateescape")
        self._is_at_end = True
