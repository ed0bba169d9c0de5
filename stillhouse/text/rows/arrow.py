"""Arrow IPC, a record batch at a time: files (Feather is one), and streams, as `datasets` saves.

A file's footer says where its batches are, so that it can be cut and read from the middle. A stream
is read from its beginning. How many rows a batch has is in its metadata, a FlatBuffer, of which
Arrow's Python has no reader that leaves the data alone.
"""

import io
import struct
from collections.abc import Iterator, Sequence
from typing import IO, Any

import pyarrow as pa

from stillhouse.errors import BadFileError
from stillhouse.text.rows.record import BATCH_ROWS, Record, Wanted, batch_records

_MAGIC = b"ARROW1"
_CONTINUES = b"\xff\xff\xff\xff"
_BLOCK = struct.Struct("<qi4xq")
"""Of a footer's vectors of blocks: offset, length of the metadata, length of the body."""
_MESSAGE_HEADER, _BATCH_LENGTH, _FOOTER_BATCHES = 2, 0, 3
"""Numbers of the fields that are read."""


def piece_rows(stream: IO[bytes]) -> tuple[int, ...] | None:
    """Rows of each record batch of a file; None for a stream, and for one that cannot be read."""
    try:
        return tuple(_batch_rows(stream))
    except BadFileError:
        return None


def read(stream: IO[bytes], wanted: Wanted) -> Iterator[Record]:
    """The wanted rows; of a file, only the batches that hold them are read."""
    is_file = stream.read(len(_MAGIC)) == _MAGIC
    counts = _batch_rows(stream) if is_file else []
    open_ipc: Any = pa.ipc.open_file if is_file else pa.ipc.open_stream
    stream.seek(0)
    schema: pa.Schema = open_ipc(stream).schema
    columns = wanted.columns(schema)
    used = [schema.get_field_index(column) for column in columns.values()]
    stream.seek(0)
    reader = open_ipc(stream, options=pa.ipc.IpcReadOptions(included_fields=used))
    batches = _of_file(reader, counts, wanted) if is_file else _of_stream(reader)
    for start, batch in batches:
        if start > wanted.last:
            return
        slices = (batch.slice(at, BATCH_ROWS) for at in range(0, batch.num_rows, BATCH_ROWS))
        yield from batch_records(slices, columns, start, wanted)


def _of_file(
    reader: Any, counts: Sequence[int], wanted: Wanted
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """The batches that have wanted rows, and the number of the first row of each."""
    start = 0
    for index, count in enumerate(counts):
        if wanted.overlaps(start, start + count):
            yield start, reader.get_batch(index)
        start += count


def _of_stream(reader: Any) -> Iterator[tuple[int, pa.RecordBatch]]:
    start = 0
    for batch in reader:
        yield start, batch
        start += batch.num_rows


# ----------------------------------------------------------------------------------- FlatBuffers


def _batch_rows(stream: IO[bytes]) -> list[int]:
    """Rows of each record batch of a file, by the metadata of its batches.

    Raises:
        BadFileError: it is no file, or cut off.
    """
    size = stream.seek(0, io.SEEK_END)
    tail = _at(stream, max(size - 10, 0), 10)
    if not tail.endswith(_MAGIC):
        raise BadFileError("it is cut off: an Arrow file ends with `ARROW1`")
    length = int.from_bytes(tail[:4], "little")
    try:
        return _rows_by_footer(stream, _at(stream, size - 10 - length, length))
    except (struct.error, ValueError) as error:
        raise BadFileError(f"its footer is broken: {error}") from error


def _rows_by_footer(stream: IO[bytes], footer: bytes) -> list[int]:
    blocks = _follow(footer, _field(footer, _root(footer), _FOOTER_BATCHES))
    count = _number("<I", footer, blocks) if blocks else 0
    rows: list[int] = []
    for number in range(count):
        offset, num_bytes, _ = _BLOCK.unpack_from(footer, blocks + 4 + number * _BLOCK.size)
        message = _at(stream, offset, num_bytes)
        message = message[8:] if message.startswith(_CONTINUES) else message[4:]
        batch = _follow(message, _field(message, _root(message), _MESSAGE_HEADER))
        place = _field(message, batch, _BATCH_LENGTH)
        rows.append(_number("<q", message, place) if place else 0)
    return rows


def _at(stream: IO[bytes], offset: int, size: int) -> bytes:
    stream.seek(offset)
    return stream.read(size)


def _number(kind: str, data: bytes, place: int) -> int:
    return struct.unpack_from(kind, data, place)[0]


def _root(data: bytes) -> int:
    return _number("<I", data, 0)


def _field(data: bytes, table: int, number: int) -> int:
    """Where a field of a table lies; 0 for one that has its default."""
    entries = table - _number("<i", data, table)
    entry = 4 + 2 * number
    offset = _number("<H", data, entries + entry) if entry < _number("<H", data, entries) else 0
    return table + offset if offset else 0


def _follow(data: bytes, place: int) -> int:
    """Where an offset leads."""
    return place + _number("<I", data, place) if place else 0
