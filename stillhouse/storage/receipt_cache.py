"""Receipts of a kind, kept together in one object, so that a later run does not read each of them.

It is a cache: a receipt counts as long as its own object exists. Of two racing runs the last one's
cache stays.
"""

from collections.abc import Callable, Collection
from contextlib import suppress

import pyarrow as pa

from stillhouse.errors import ArtifactError
from stillhouse.storage.commit import replace
from stillhouse.storage.filesystem import join
from stillhouse.storage.parquet import parquet_bytes, read_table

FEW = 64
"""Receipts that are read one by one."""
_SCHEMA = pa.schema([("task", pa.string()), ("receipt", pa.binary())])


def cached_receipts(store: str, kind: str, tasks: Collection[str]) -> dict[str, bytes]:
    """The receipts of those of some tasks that the cache has, as they were stored."""
    if len(tasks) <= FEW:
        return {}
    found, wanted = _read(store, kind), set(tasks)
    names = found["task"].to_pylist()
    return {name: found["receipt"][i].as_py() for i, name in enumerate(names) if name in wanted}


def cache_receipts(
    store: str, kind: str, tasks: Collection[str], receipt_of: Callable[[str], bytes]
) -> None:
    """Add the receipts of some tasks, as they were stored, if the cache lacks more than a few."""
    if len(tasks) <= FEW:
        return
    known = _read(store, kind)
    missing = set(tasks) - set(known["task"].to_pylist())
    if len(missing) > FEW:
        names = sorted(missing)
        columns = [names, [receipt_of(task) for task in names]]
        added = pa.table(dict(zip(_SCHEMA.names, columns, strict=True)), schema=_SCHEMA)
        replace(_uri(store, kind), parquet_bytes(pa.concat_tables([known, added])))


def _read(store: str, kind: str) -> pa.Table:
    with suppress(FileNotFoundError, ArtifactError, pa.ArrowInvalid):  # damaged: as good as none
        return read_table(_uri(store, kind)).cast(_SCHEMA)
    return _SCHEMA.empty_table()


def _uri(store: str, kind: str) -> str:
    return join(store, "cache", f"receipts-{kind}.parquet")
