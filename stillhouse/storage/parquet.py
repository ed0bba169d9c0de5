"""Parquet with a checksum in every page, which readers check.

Without one, a flipped bit is silently read as other values.
"""

import io
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from stillhouse.errors import ArtifactError
from stillhouse.storage.filesystem import open_read, read_bytes
from stillhouse.storage.ranges import FetchedRanges

ROW_GROUP = 8192


def parquet_bytes(table: pa.Table, row_group: int = ROW_GROUP) -> bytes:
    """The table as one Parquet file, compressed by zstd."""
    buffer = io.BytesIO()
    pq.write_table(
        table, buffer, compression="zstd", row_group_size=row_group, write_page_checksum=True
    )
    return buffer.getvalue()


def open_parquet(
    stream: IO[bytes] | io.RawIOBase, metadata: pq.FileMetaData | None = None, buffer_size: int = 0
) -> pq.ParquetFile:
    return pq.ParquetFile(
        stream, metadata=metadata, buffer_size=buffer_size, page_checksum_verification=True
    )


@contextmanager
def open_part(uri: str, metadata: pq.FileMetaData | None = None) -> Generator[pq.ParquetFile]:
    """Open a Parquet object of a store, to read it by row groups; `metadata` is its footer.

    Raises:
        ArtifactError: it is missing, or not what was written.
    """
    with _naming(uri), open_read(uri) as stream:
        yield open_parquet(stream, metadata)


def read_table(uri: str, columns: list[str] | None = None) -> pa.Table:
    """A whole Parquet object of a store as a table.

    Raises:
        ArtifactError: it is missing, or not what was written.
    """
    with _naming(uri):
        return parse_table(read_bytes(uri), columns)


def read_rows(uri: str, num_bytes: int, start: int, stop: int) -> pa.Table:
    """The rows from `start` to `stop` of a Parquet object of a store; as `read_groups`."""
    first = end = skipped = 0

    def overlaps(group: pq.RowGroupMetaData) -> bool:
        nonlocal first, end, skipped
        first, end = end, end + group.num_rows
        if end <= start:
            skipped = end
        return first < stop and end > start

    table = read_groups(uri, num_bytes, overlaps)
    return table.slice(start - skipped, stop - start)


def read_groups(
    uri: str, num_bytes: int, wanted: Callable[[pq.RowGroupMetaData], bool]
) -> pa.Table:
    """The rows of some row groups of a Parquet object of a store.

    One request for the end of the object, a second one where its footer is longer than 64 KiB, and
    one for each run of neighbouring groups that is not in it.

    Args:
        num_bytes: size of the object.
        wanted: which row groups, by their metadata.

    Raises:
        ArtifactError: it is missing, or not what was written.
    """
    with _naming(uri):
        known = FetchedRanges(uri, num_bytes)
        file = open_parquet(known)
        groups = [i for i in range(file.num_row_groups) if wanted(file.metadata.row_group(i))]
        for start, end in _runs([_span(file.metadata.row_group(i)) for i in groups]):
            known.fetch(start, end)
        return file.read_row_groups(groups)


def _span(group: pq.RowGroupMetaData) -> tuple[int, int]:
    """Where the bytes of a row group begin and end."""
    columns = [group.column(i) for i in range(group.num_columns)]
    starts = [c.dictionary_page_offset or c.data_page_offset for c in columns]
    ends = [s + c.total_compressed_size for s, c in zip(starts, columns, strict=True)]
    return min(starts), max(ends)


def _runs(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ascending spans, those that touch as one."""
    runs: list[tuple[int, int]] = []
    for start, end in spans:
        if runs and runs[-1][1] == start:
            start = runs.pop()[0]
        runs.append((start, end))
    return runs


def parse_table(data: bytes, columns: list[str] | None = None) -> pa.Table:
    return pq.read_table(pa.BufferReader(data), columns=columns, page_checksum_verification=True)


@contextmanager
def _naming(uri: str) -> Generator[Any]:
    """Turn errors of reading into an ArtifactError that names the object."""
    try:
        yield
    except FileNotFoundError as error:
        raise ArtifactError(
            f"part {uri} is missing though the store names it: put it back, or begin a new `store`"
        ) from error
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's own
        raise ArtifactError(
            f"part {uri} is broken: {error}: restore it, or remove it and run again"
        ) from error
