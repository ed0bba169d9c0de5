"""Parquet with a checksum in every page, which readers check.

Without one, a flipped bit is silently read as other values.
"""

import io
from collections.abc import Generator
from contextlib import contextmanager
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from stillhouse.errors import ArtifactError
from stillhouse.storage.filesystem import open_read, read_bytes

ROW_GROUP = 8192


def parquet_bytes(table: pa.Table, row_group: int = ROW_GROUP) -> bytes:
    """The table as one Parquet file, compressed by zstd."""
    buffer = io.BytesIO()
    pq.write_table(
        table, buffer, compression="zstd", row_group_size=row_group, write_page_checksum=True
    )
    return buffer.getvalue()


def open_parquet(
    stream: IO[bytes], metadata: pq.FileMetaData | None = None, buffer_size: int = 0
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
