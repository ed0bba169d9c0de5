"""Columns of vectors in Arrow tables, and what `datasets` is told of them."""

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def lists(rows: NDArray[Any]) -> pa.Array:
    """Rows [N, a, b, ...] as lists of fixed sizes, one within the other."""
    found = pa.array(np.ascontiguousarray(rows).ravel())
    for length in reversed(rows.shape[1:]):
        found = pa.FixedSizeListArray.from_arrays(found, length)
    return found


def flat_values(table: pa.Table, name: str) -> NDArray[Any]:
    """All values of a column of `lists`, flat; a row that is null has none."""
    found = table[name].combine_chunks()
    while pa.types.is_fixed_size_list(found.type):
        found = found.flatten()
    return np.array(found)


def feature(dtype: str, *lengths: int) -> dict[str, Any]:
    """The type of such a column in the words of `datasets`."""
    found: dict[str, Any] = {"dtype": dtype, "_type": "Value"}
    for length in reversed(lengths):
        found = {"feature": found, "length": length, "_type": "List"}
    return found
