"""Reading the windows of an order from parts, ahead of the training.

A `Fetch` maps windows to tables, one each, in the same order: with a thread here, with Ray Data in
a job. Every row keeps the part and row it was read from. Without torch, which Ray Data's readers
do not need.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from stillhouse.errors import ArtifactError
from stillhouse.storage.parquet import open_part
from stillhouse.training.order import Window
from stillhouse.training.signals import SignalPart, column
from stillhouse.training.task import TokenSet

Fetch = Callable[[Iterator[Window]], Iterator[pa.Table]]
"""Maps windows to tables as of `PartReader.read`, one each, in the same order."""

CACHE_BYTES = 128 << 20
_CACHED_FOOTERS = 256


class PartReader:
    """Reads windows of parts; row groups without a wanted row are not read.

    The row groups read last are cached, up to `CACHE_BYTES`: windows of several lanes share them.

    Args:
        uris: of all parts of all data sets, in the order's numbering.
        chosen: of each part the rows that the order counts, ascending; None: all of them.
        signals: further columns to read, where a part has them.
        beside: of each teacher and part, the parts with its signals.
    """

    def __init__(
        self,
        uris: Sequence[str],
        chosen: Sequence[NDArray[np.int64] | None] | None = None,
        signals: Sequence[str] = (),
        beside: Sequence[Sequence[Sequence[SignalPart]]] = (),
    ) -> None:
        self._uris, self._signals, self._beside = uris, signals, beside
        self._chosen = chosen or [None] * len(uris)
        self._groups: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()
        self._num_bytes = 0
        self._metadata = lru_cache(_CACHED_FOOTERS)(self._read_metadata)

    @classmethod
    def of(cls, sets: Sequence[TokenSet], signals: Sequence[str] = ()) -> "PartReader":
        """A reader of all parts of some data sets."""
        chosen = [rows for one in sets for rows in one.chosen or [None] * len(one.uris)]
        teachers = max(len(one.signals) for one in sets)
        beside = [[part for one in sets for part in one.signals[i]] for i in range(teachers)]
        return cls([uri for one in sets for uri in one.uris], chosen, signals, beside)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled without its cache."""
        return PartReader, (self._uris, self._chosen, self._signals, self._beside)

    def read(self, window: Window) -> pa.Table:
        """The rows of a window, in the order of `window.spans`.

        Columns: `input_ids`, `documents` and signals where the part has them, `part` and `row`
        (int64, the row in the file).

        Raises:
            ArtifactError: a part is missing, broken, or has too few rows.
        """
        tables = [t for s in window.spans for t in self._span(s.part, s.first, s.last)]
        table = pa.concat_tables(tables).combine_chunks()
        if table.num_rows != window.num_rows:
            raise ArtifactError(
                f"parts {sorted({self._uris[s.part] for s in window.spans})} have "
                f"{table.num_rows} rows where {window.num_rows} are listed: run `stillhouse verify`"
            )
        return table

    def _span(self, part: int, first: int, last: int) -> Iterator[pa.Table]:
        """The wanted rows [first, last) of a part, one table a row group."""
        metadata, chosen = self._metadata(part), self._chosen[part]
        start = taken = 0
        for group in range(metadata.num_row_groups):
            end = start + metadata.row_group(group).num_rows
            count = end - start
            if chosen is not None:
                count = int(np.searchsorted(chosen, end)) - taken
            if first < taken + count and taken < last:
                begin = max(first - taken, 0)
                yield self._group(part, group, start).slice(begin, last - taken - begin)
            start, taken = end, taken + count

    def _read_metadata(self, part: int) -> pq.FileMetaData:
        with open_part(self._uris[part]) as file:
            return file.metadata

    def _group(self, part: int, group: int, position: int) -> pa.Table:
        """The wanted rows of a row group, whose first row is row `position` of its part."""
        if (part, group) in self._groups:
            self._groups.move_to_end((part, group))
            return self._groups[part, group]
        with open_part(self._uris[part], self._metadata(part)) as file:
            names = {*file.schema_arrow.names}
            columns = [n for n in ("input_ids", "documents", *self._signals) if n in names]
            table = file.read_row_group(group, columns=columns, use_threads=False)
        for i, teacher in enumerate(self._beside):
            found = _rows_of(teacher[part], position, table.num_rows)
            for name in found.column_names:
                table = table.append_column(column(name, i), found[name])
        rows = np.arange(position, position + table.num_rows)
        chosen = self._chosen[part]
        if chosen is not None:
            rows = chosen[slice(*np.searchsorted(chosen, [position, position + table.num_rows]))]
            table = table.take(pa.array(rows - position))
        table = table.append_column("row", pa.array(rows))
        table = table.append_column("part", pa.array(np.full_like(rows, part)))
        self._groups[part, group] = table
        self._num_bytes += table.nbytes
        while self._num_bytes > CACHE_BYTES and len(self._groups) > 1:
            self._num_bytes -= self._groups.popitem(last=False)[1].nbytes
        return table


def _rows_of(parts: Sequence[SignalPart], first: int, count: int) -> pa.Table:
    """The rows [first, first + count) of consecutive parts."""
    tables: list[pa.Table] = []
    start = 0
    for part in parts:
        if start < first + count and first < start + part.rows:
            with open_part(part.uri) as file:
                group_start = start
                for group in range(file.metadata.num_row_groups):
                    num_rows = file.metadata.row_group(group).num_rows
                    if group_start < first + count and first < group_start + num_rows:
                        begin = max(first - group_start, 0)
                        table = file.read_row_group(group, use_threads=False)
                        tables.append(table.slice(begin, first + count - group_start - begin))
                    group_start += num_rows
        start += part.rows
    return pa.concat_tables(tables).combine_chunks()


def read_ahead(reader: PartReader, rows: int) -> Fetch:
    """A thread that reads ahead: at least one window, and at least `rows` rows."""

    def fetch(windows: Iterator[Window]) -> Iterator[pa.Table]:
        thread = ThreadPoolExecutor(1, "read-ahead")
        pending: deque[tuple[int, Future[pa.Table]]] = deque()
        ahead = 0
        try:
            for window in windows:
                pending.append((window.num_rows, thread.submit(reader.read, window)))
                ahead += window.num_rows
                while len(pending) > 1 and ahead - pending[0][0] >= rows:
                    num_rows, table = pending.popleft()
                    ahead -= num_rows
                    yield table.result()
            while pending:
                yield pending.popleft()[1].result()
        finally:
            for _, table in pending:
                table.cancel()
            thread.shutdown(wait=False)

    return fetch
