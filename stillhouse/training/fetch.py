"""Reading the windows of an order from parts, ahead of the training.

A `Fetch` maps windows to tables, one each and in the same order: here with one thread; Ray Data in
a job. Each row carries the address at which it was found in its file through everything after.
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
from stillhouse.training.task import TokenSet

Fetch = Callable[[Iterator[Window]], Iterator[pa.Table]]
"""Maps windows to tables of `PartReader.read`, one each and in their order."""

CACHE_BYTES = 128 << 20
_CACHED_FOOTERS = 256


class PartReader:
    """Reads windows of parts; row groups without a wanted row are not read.

    Row groups read last are kept, up to `CACHE_BYTES`: lanes and windows meet inside them. A data
    set below that size is read once.

    Args:
        uris: of all parts of all data sets, in the order's numbering.
        chosen: of each part the rows that the order counts, ascending; None: all of them.
        signals: columns that an objective asks for; they may be missing.
    """

    def __init__(
        self,
        uris: Sequence[str],
        chosen: Sequence[NDArray[np.int64] | None] | None = None,
        signals: Sequence[str] = (),
    ) -> None:
        self._uris, self._chosen, self._signals = uris, chosen, signals
        self._wanted = ("input_ids", "documents", *signals)
        self._groups: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()
        self._num_bytes = 0
        self._metadata = lru_cache(_CACHED_FOOTERS)(self._read_metadata)

    @classmethod
    def of(cls, sets: Sequence[TokenSet], signals: Sequence[str] = ()) -> "PartReader":
        """For the parts of some data sets."""
        chosen = [
            None if one.chosen is None else one.chosen[i]
            for one in sets
            for i in range(len(one.uris))
        ]
        return cls([uri for one in sets for uri in one.uris], chosen, signals)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy in another process begins without what this one has read."""
        return PartReader, (self._uris, self._chosen, self._signals)

    def read(self, window: Window) -> pa.Table:
        """Columns `part` and `row` (int64) of each row as it was found in the file, `input_ids`,
        and `documents` and signals where the part has them; in the order of `window.spans`.

        Raises:
            ArtifactError: a part is missing, broken, or shorter than it should be.
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
        """Those of a part from the `first` to before the `last` of its wanted rows."""
        metadata, chosen = self._metadata(part), self._rows(part)
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

    def _rows(self, part: int) -> NDArray[np.int64] | None:
        return None if self._chosen is None else self._chosen[part]

    def _read_metadata(self, part: int) -> pq.FileMetaData:
        with open_part(self._uris[part]) as file:
            return file.metadata

    def _group(self, part: int, group: int, position: int) -> pa.Table:
        """The wanted rows of a row group, which begins at row `position` of its part."""
        if (part, group) in self._groups:
            self._groups.move_to_end((part, group))
            return self._groups[part, group]
        with open_part(self._uris[part], self._metadata(part)) as file:
            columns = [name for name in self._wanted if name in file.schema_arrow.names]
            table = file.read_row_group(group, columns=columns, use_threads=False)
        rows = np.arange(position, position + table.num_rows)
        chosen = self._rows(part)
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


def read_ahead(reader: PartReader, rows: int) -> Fetch:
    """A thread that reads windows while others are trained on: at least one, and `rows` rows."""

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
