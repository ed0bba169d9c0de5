"""What lies in a file of training data: tokens, or documents; prompts and answers."""

from itertools import islice

import numpy as np
import pyarrow as pa

from stillhouse.custom_code import CustomCode
from stillhouse.data_settings import ColumnNames, DataSource
from stillhouse.errors import InputError
from stillhouse.storage.filesystem import open_read
from stillhouse.storage.parquet import open_parquet
from stillhouse.text.records import read_records

_PAIRS = (("prompt", "completion"), ("input", "target"))
"""What prompt and answer are called: by most, and by the tasks of `job: mix`."""
_MOST_CHARS = 10_000_000
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


def prompt_columns(item: DataSource, uri: str) -> ColumnNames:
    """The columns of a source, with those of prompts and answers where it names none and a file at
    `uri` has them under names that people use.
    """
    if item.columns != ColumnNames():
        return item.columns
    names = columns_of(uri) or _keys(uri, item.reader)
    found = [pair for pair in _PAIRS if set(pair) <= names]
    if "text" in names or not found:
        return item.columns
    prompt, answer = found[0]
    return ColumnNames(prompt=prompt, text=answer)


def columns_of(uri: str) -> set[str]:
    """Of a Parquet file; none of another."""
    if not uri.lower().endswith((".parquet", ".pq")):
        return set()
    with open_read(uri) as stream:
        return {*open_parquet(stream).schema_arrow.names}


def _keys(uri: str, reader: str | CustomCode) -> set[str]:
    """Of the first row of a file that is not Parquet."""
    records = read_records(uri, lambda _: [], text="text", max_chars=_MOST_CHARS, given=reader)
    return {key for record in islice(records, 1) for key in record.values}
