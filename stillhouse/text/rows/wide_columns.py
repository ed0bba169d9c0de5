"""Parquet columns of long texts, value by value.

Readers decompress a page at once. A writer may have put hundreds of megabytes into one, since many
close a page after a number of values: then a page is read here as a stream, and a value that is too
long is skipped. Columns without nesting, of plain values; pages of either version.
"""

import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stillhouse.errors import BadFileError

_WIDE_VALUE, _WIDE_CHUNK = 1 << 20, 64 << 20
_CODECS = {"UNCOMPRESSED": None, "ZSTD": "zstd", "GZIP": "gzip", "BROTLI": "brotli"}
_PLAIN = {"PLAIN", "RLE"}  # RLE: of which values are null
_PREVIEW, _SKIP = 1024, 1 << 20
_DATA_PAGE, _DATA_PAGE_V2 = 0, 3


@dataclass(frozen=True, slots=True)
class TooLong:
    """A value that was skipped; `beginning` are its first bytes."""

    beginning: bytes


def wide_column(parquet: pq.ParquetFile, group: int, name: str) -> int | None:
    """The index of a column of a row group whose values are to be streamed; else None."""
    names: list[str] = [parquet.schema.column(i).path for i in range(len(parquet.schema))]
    if name not in names:
        return None
    index = names.index(name)
    column, chunk = parquet.schema.column(index), parquet.metadata.row_group(group).column(index)
    total = chunk.total_uncompressed_size
    wide = total > max(_WIDE_CHUNK, _WIDE_VALUE * chunk.num_values)
    flat = column.max_repetition_level == 0 and column.max_definition_level <= 1
    plain = chunk.physical_type == "BYTE_ARRAY" and {*chunk.encodings} <= _PLAIN
    return index if wide and flat and plain and chunk.compression in _CODECS else None


def wide_values(
    stream: IO[bytes], parquet: pq.ParquetFile, group: int, index: int, max_bytes: int
) -> Iterator[bytes | TooLong | None]:
    """The values of a column in a row group, in order; None for null.

    Args:
        stream: the file, from any position.
        index: a `wide_column`.
        max_bytes: longer values are skipped.

    Raises:
        BadFileError: a page that is not what its header says.
    """
    chunk = parquet.metadata.row_group(group).column(index)
    nullable = parquet.schema.column(index).max_definition_level == 1
    position, left = int(chunk.data_page_offset), int(chunk.num_values)
    while left > 0:
        header, position = _page_header(stream, position)
        page = _Page(stream, position, header[3])
        position += header[3]
        if header[1] not in (_DATA_PAGE, _DATA_PAGE_V2):
            continue
        about = header[5 if header[1] == _DATA_PAGE else 8]
        left -= about[1]
        yield from _page_values(page, header[1], about, chunk.compression, nullable, max_bytes)
        page.check(header.get(4))


def _page_values(
    page: "_Page", kind: int, about: dict[int, Any], codec: str, nullable: bool, max_bytes: int
) -> Iterator[bytes | TooLong | None]:
    count, levels = about[1], b""
    compressed = _CODECS[codec] is not None
    if kind == _DATA_PAGE_V2:  # whose levels come first, as they are
        levels = page.read(about[6] + about[5])[about[6] :]
        compressed = compressed and about.get(7, True)
    body: Any = page
    if compressed:
        body = pa.CompressedInputStream(pa.PythonFile(page, mode="r"), cast(Any, _CODECS[codec]))
    if kind == _DATA_PAGE and nullable:
        levels = _exactly(body, int.from_bytes(_exactly(body, 4), "little"))
    present = _present(levels, count) if nullable else np.ones(count, np.bool_)
    for there in present:
        if not there:
            yield None
            continue
        length = int.from_bytes(_exactly(body, 4), "little")
        if length <= max_bytes:
            yield _exactly(body, length)
            continue
        beginning = _exactly(body, min(length, _PREVIEW))
        for skipped in range(len(beginning), length, _SKIP):
            _exactly(body, min(_SKIP, length - skipped))
        yield TooLong(beginning)


class _Page(io.RawIOBase):
    """The bytes of a page; the stream may be moved between two reads."""

    def __init__(self, stream: IO[bytes], position: int, size: int) -> None:
        self._stream, self._position, self._left, self._crc = stream, position, size, 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        size = self._left if size < 0 else min(size, self._left)
        self._stream.seek(self._position)
        data = self._stream.read(size)
        self._position += len(data)
        self._left -= len(data)
        self._crc = zlib.crc32(data, self._crc)
        return data

    def check(self, crc: int | None) -> None:
        """Compare with the checksum of the header, if it has one."""
        while self._left and self.read(_SKIP):
            pass
        if crc is not None and self._crc != crc & 0xFFFFFFFF:
            raise BadFileError("a page has another checksum than its header says")


def _exactly(body: Any, size: int) -> bytes:
    parts: list[bytes] = []
    while size > 0 and (data := body.read(size)):
        parts.append(data)
        size -= len(data)
    if size:
        raise BadFileError("a page ends too early")
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _present(levels: bytes, count: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which values are there: levels of one bit, in runs and packed groups of eight."""
    found: list[Any] = []
    stream, have = io.BytesIO(levels), 0
    while have < count:
        run = _varint(stream)
        if run & 1:
            packed = np.frombuffer(stream.read(run >> 1), np.uint8)
            found.append(np.unpackbits(packed, bitorder="little").astype(np.bool_))
        else:
            found.append(np.full(run >> 1, stream.read(1) == b"\x01"))
        have += len(found[-1])
    return np.concatenate(found)[:count]


# ------------------------------------------------------------------- headers: Thrift, compact


def _page_header(stream: IO[bytes], position: int) -> tuple[dict[int, Any], int]:
    """The fields of a page's header by their numbers, and where the page begins."""
    stream.seek(position)
    found = _struct(stream)
    return found, stream.tell()


def _struct(stream: IO[bytes]) -> dict[int, Any]:
    found: dict[int, Any] = {}
    number = 0
    while (head := _byte(stream)) != 0:
        number = number + (head >> 4) if head >> 4 else _signed(stream)
        found[number] = _value(stream, head & 15)
    return found


def _value(stream: IO[bytes], kind: int) -> Any:
    match kind:
        case 1 | 2:
            return kind == 1
        case 3:
            return _byte(stream)
        case 4 | 5 | 6:
            return _signed(stream)
        case 7:
            return stream.read(8)
        case 8:
            return stream.read(_varint(stream))
        case 9 | 10:
            head = _byte(stream)
            size = head >> 4 if head >> 4 != 15 else _varint(stream)
            return [_value(stream, head & 15) for _ in range(size)]
        case 12:
            return _struct(stream)
        case _:
            raise BadFileError("a page has a header that cannot be read")


def _byte(stream: IO[bytes]) -> int:
    data = stream.read(1)
    if not data:
        raise BadFileError("it ends in the middle of a page's header")
    return data[0]


def _varint(stream: IO[bytes]) -> int:
    value = shift = 0
    while (byte := _byte(stream)) & 128:
        value |= (byte & 127) << shift
        shift += 7
    return value | byte << shift


def _signed(stream: IO[bytes]) -> int:
    value = _varint(stream)
    return value >> 1 ^ -(value & 1)
