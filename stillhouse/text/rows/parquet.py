"""Parquet, a row group at a time; of structs only the leaves that are wanted are read."""

from collections.abc import Iterator
from dataclasses import replace
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from stillhouse.storage.parquet import open_parquet
from stillhouse.text.rows.record import (
    BATCH_BYTES,
    BATCH_ROWS,
    READ_BYTES,
    Record,
    Wanted,
    batch_records,
    too_long,
)
from stillhouse.text.rows.wide_columns import TooLong, wide_column, wide_values

_BYTES_PER_CHAR = 4  # of UTF-8, at most


def piece_rows(stream: IO[bytes]) -> tuple[int, ...] | None:
    """Rows of each row group; None for a file that cannot be read."""
    try:
        footer = pq.ParquetFile(stream).metadata
    except (pa.ArrowInvalid, OSError):
        return None
    return tuple(footer.row_group(i).num_rows for i in range(footer.num_row_groups))


def read(stream: IO[bytes], wanted: Wanted) -> Iterator[Record]:
    """The wanted rows, in batches of about 16 MB."""
    text, max_chars = wanted.text, wanted.max_chars
    with open_parquet(stream, buffer_size=READ_BYTES) as parquet:
        columns = wanted.columns(parquet.schema_arrow)
        start = 0
        for group in range(parquet.num_row_groups):
            stop = start + parquet.metadata.row_group(group).num_rows
            wide = wide_column(parquet, group, text) if columns.get(text) == text else None
            if wanted.overlaps(start, stop) and wide is not None:
                values = wide_values(stream, parquet, group, wide, _BYTES_PER_CHAR * max_chars)
                others = {path: column for path, column in columns.items() if path != text}
                batches = parquet.iter_batches(BATCH_ROWS, [group], columns=[*others])
                rows = batch_records(
                    batches, others, start, replace(wanted, rows=range(start, stop))
                )
                wide_rows = _wide_records(values, rows, text, max_chars)
                yield from (row for row in wide_rows if wanted.overlaps(row.row, row.row + 1))
            elif wanted.overlaps(start, stop):
                size = _batch_rows(parquet.metadata.row_group(group), [*columns.values()])
                batches = parquet.iter_batches(size, row_groups=[group], columns=[*columns])
                yield from batch_records(batches, columns, start, wanted)
            start = stop


def _wide_records(
    values: Iterator[bytes | TooLong | None], rows: Iterator[Record], text: str, max_chars: int
) -> Iterator[Record]:
    """The rows with their long texts, which are read apart."""
    for value, record in zip(values, rows, strict=True):
        if isinstance(value, TooLong):
            yield Record(record.row, broken=too_long(max_chars), raw=value.beginning)
        else:
            yield Record(record.row, record.values | {text: value})


def _batch_rows(group: pq.RowGroupMetaData, columns: list[str]) -> int:
    """Number of rows of about 16 MB."""
    chunks = (group.column(i) for i in range(group.num_columns))
    used = (c for c in chunks if any(f"{c.path_in_schema}.".startswith(f"{n}.") for n in columns))
    num_bytes = sum(chunk.total_uncompressed_size for chunk in used)
    return max(1, min(BATCH_ROWS, BATCH_BYTES * group.num_rows // max(num_bytes, 1)))
