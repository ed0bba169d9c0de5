"""Plain text: a file is one row."""

from collections.abc import Iterator
from typing import IO

from stillhouse.text.rows.record import Record, Wanted, too_long


def read(stream: IO[bytes], wanted: Wanted) -> Iterator[Record]:
    """The text of the file as its only row."""
    if wanted.overlaps(0, 1):
        yield _record(stream, wanted.text, wanted.max_chars)


def _record(stream: IO[bytes], key: str, max_chars: int) -> Record:
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
