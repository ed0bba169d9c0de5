"""Columns that a selection's rows carry beside tokens and scores: `pool.keep_columns`, and `text`.

Columns are neither packed nor scored. They are read again from the raw files, for kept documents
only, so that naming other columns makes nothing but the selection again. All values are text:
strings as they are, numbers, booleans and dates as written, lists and objects as JSON. A sequence
has pieces of several documents: each of its `documents` carries its own values.
"""

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stillhouse.data_settings import DataSource, PoolSource
from stillhouse.errors import BadFileError, SpecError
from stillhouse.text.pieces import read_pieces, token_ids, with_piece_fields
from stillhouse.text.records import folder_keys, read_records
from stillhouse.text.rows.record import Choose, Record
from stillhouse.text.tasks import UnitFile
from stillhouse.text.tokenizer import load_tokenizer
from stillhouse.text.values import (
    ABSENT,
    as_text,
    column_of,
    column_paths,
    find,
    key_paths,
    label,
)

_ROWS_SEARCHED = 1000
"""Rows in which a key is looked for, in a file without a schema."""
_SHOWN_CHARS = 300
_OF_ROWS = "input_ids documents text id source num_tokens raw_file raw_row score part row"
_OF_PIECES = "start end file prior_nll conditional_nll"
_TAKEN = {*_OF_ROWS.split(), *_OF_PIECES.split()}
"""Columns of a selection's rows, and fields of the documents in them."""


def check_columns(pool: PoolSource, uris: Sequence[str]) -> None:
    """Refuse columns that no file of the pool has, and names that a selection uses already.

    Raises:
        SpecError: naming the columns.
    """
    for i, name in enumerate(pool.keep_columns):
        if name in _TAKEN or name in pool.keep_columns[:i]:
            raise SpecError(
                f"`pool.keep_columns`: every selection has `{name}` already, or it is named twice"
            )
    require_columns("pool.keep_columns", pool.keep_columns, pool, uris)


def require_columns(key: str, names: Sequence[str], pool: DataSource, uris: Sequence[str]) -> None:
    """Refuse columns, named by a key of the spec, that no file of the pool has.

    Files are opened until every column was found once. A file without a schema is searched at its
    beginning. Files that cannot be read are left to the scan.

    Raises:
        SpecError: naming the columns, and those that exist.
    """
    missing, seen = list(names), dict[str, None]()
    for uri in uris:
        if not missing:
            return
        try:
            found = _paths_in(missing, uri, pool, seen)
        except BadFileError:
            continue
        missing = [name for name in missing if name not in found]
    if missing:
        absent, existing = ", ".join(f"`{name}`" for name in missing), ", ".join(seen)
        raise SpecError(
            f"`{key}`: nothing in {pool.path!r} has {absent}; there are: "
            f"{existing[:_SHOWN_CHARS] or 'no columns (plain text)'}"
        )


def _paths_in(wanted: Sequence[str], uri: str, pool: DataSource, seen: dict[str, None]) -> set[str]:
    """The wanted paths that a file has; all its paths are added to `seen`."""
    schemas: list[pa.Schema] = []

    def choose(schema: pa.Schema) -> list[str]:
        schemas.append(schema)
        return []

    found: set[str] = set()
    for record in islice(raw_rows(uri, pool, choose, range(_ROWS_SEARCHED)), _ROWS_SEARCHED):
        if schemas or len(found) == len(wanted):
            break
        seen.update(dict.fromkeys(key_paths(record.values)))
        found |= {path for path in wanted if find(record.values, path) is not ABSENT}
    for schema in schemas:
        seen.update(dict.fromkeys(column_paths(schema)))
        found |= {path for path in wanted if column_of(schema, path) is not None}
    seen.update(dict.fromkeys(folder_keys(uri)))
    return found


def raw_rows(uri: str, pool: DataSource, choose: Choose, wanted: Sequence[int]) -> Iterator[Record]:
    """The raw rows of a file of the pool, with the columns that `choose` names (`read_records`).

    `pool.keep_columns` may be keys of the file's folders.
    """
    return read_records(
        uri,
        choose,
        text=pool.columns.text,
        max_chars=pool.max_chars,
        given=pool.reader,
        wanted=wanted,
        keys=pool.keep_columns if isinstance(pool, PoolSource) else (),
    )


def with_columns(table: pa.Table, files: Sequence[UnitFile], pool: PoolSource) -> pa.Table:
    """A selection's rows with `pool.keep_columns`, read from the raw files of their unit.

    Rows that are documents (`raw_file`, `raw_row`) get a column each, rows that are sequences a
    field each in the structs of `documents`.
    """
    if "raw_file" in table.column_names:
        file, row = table["raw_file"].to_numpy(), table["raw_row"].to_numpy()
        for name, values in _columns(file, row, files, pool).items():
            table = table.append_column(name, values)
        return table
    pieces = read_pieces(table)
    return with_piece_fields(table, _columns(pieces.file, pieces.row, files, pool))


def _columns(
    file: NDArray[np.int32], row: NDArray[np.int64], files: Sequence[UnitFile], pool: PoolSource
) -> dict[str, pa.Array]:
    """The named columns of the documents at (file, row), which may repeat."""
    names = pool.keep_columns

    def choose(schema: pa.Schema) -> list[str]:
        return [name for name in names if column_of(schema, name) is not None]

    found: dict[tuple[int, int], list[str | None]] = {}
    for index in np.unique(file).tolist():
        wanted = np.unique(row[file == index]).tolist()
        for record in raw_rows(files[index].uri, pool, choose, wanted):
            found[index, record.row] = [_as_written(find(record.values, name)) for name in names]
    rows = [found[place] for place in zip(file.tolist(), row.tolist(), strict=True)]
    return {
        name: pa.array([values[i] for values in rows], pa.string()) for i, name in enumerate(names)
    }


def _as_written(value: Any) -> str | None:
    """A value as text; None for null, NaN and no value."""
    value = as_text(value)
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, dict | list | tuple):
        return json.dumps(value, ensure_ascii=False, default=str)
    return label(value) or None


_cached_tokenizer = lru_cache(maxsize=2)(load_tokenizer)


def with_text(table: pa.Table, tokenizer: str, eos_token: str | None) -> pa.Table:
    """Sequences with their `text`: all of their tokens decoded, including EOS."""
    decode = _cached_tokenizer(tokenizer, eos_token).decode
    return table.append_column("text", pa.array(map(decode, token_ids(table)), pa.string()))
