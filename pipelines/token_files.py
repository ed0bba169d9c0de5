"""What a file of a data set holds: tokens, or other columns."""

import numpy as np
import pyarrow as pa

from stillhouse.errors import InputError
from stillhouse.storage.filesystem import open_read
from stillhouse.storage.parquet import open_parquet

_LISTS = (pa.ListType, pa.LargeListType, pa.FixedSizeListType)


def token_length(uri: str) -> int | None:
    """T of a Parquet file with a column `input_ids`; None for anything else.

    Raises:
        InputError: `input_ids` that are no lists of integers, or of several lengths.
    """
    if not uri.lower().endswith((".parquet", ".pq")):
        return None
    try:
        with open_read(uri) as stream:
            file = open_parquet(stream)
            if "input_ids" not in file.schema_arrow.names:
                return None
            kind = file.schema_arrow.field("input_ids").type
            if not isinstance(kind, _LISTS) or not pa.types.is_integer(kind.value_type):
                raise InputError(f"{uri}: `input_ids` is {kind}, not lists of integers")
            if pa.types.is_fixed_size_list(kind):
                return kind.list_size
            if not file.metadata.num_rows:
                raise InputError(f"{uri} has no rows: remove it")
            first = file.read_row_group(0, columns=["input_ids"])["input_ids"].combine_chunks()
            lengths = np.unique(first.value_lengths().drop_null().to_numpy())
    except pa.ArrowInvalid as error:
        raise InputError(f"{uri} is not a Parquet file: {error}") from error
    if first.null_count:
        raise InputError(f"{uri}: {first.null_count} rows have no `input_ids`: remove them")
    if len(lengths) != 1:
        raise InputError(
            f"{uri}: sequences of {lengths.min()} to {lengths.max()} tokens: pack them to one T"
        )
    return int(lengths[0])


def columns_of(uri: str) -> set[str]:
    """Columns of a Parquet file; none for another."""
    if not uri.lower().endswith((".parquet", ".pq")):
        return set()
    with open_read(uri) as stream:
        return {*open_parquet(stream).schema_arrow.names}
