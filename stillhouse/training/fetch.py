"""Reading the windows of an order from parts, ahead of the training.

A `Fetch` maps windows to tables, one each and in the same order: here with one thread; Ray Data in
a job. Each row carries the address at which it was found in its file through everything after.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stillhouse.errors import ArtifactError
from stillhouse.storage.parquet import open_part
from stillhouse.training.order import Window

Fetch = Callable[[Iterator[Window]], Iterator[pa.Table]]
"""Maps windows to tables of `PartReader.read`, one each and in their order."""

_CACHE_BYTES = 128 << 20
_CACHED_FOOTERS = 256
_WANTED = ("input_ids", "documents")


class PartReader:
    """Reads windows of parts; row groups without a wanted row are not read.

    Row groups read last are kept, up to 128 MB: lanes and windows meet inside them. A data set
    below that size is read once.

    Args:
        uris: of all parts of all data sets, in the order's numbering.
    """

    def __init__(self, uris: Sequence[str]) -> None:
        self._uris = uris
        self._groups: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()
        self._num_bytes = 0
        self._metadata = lru_cache(_CACHED_FOOTERS)(self._read_metadata)

    def read(self, window: Window) -> pa.Table:
        """Columns `part` and `row` (int64) of each row as it was found in the file, `input_ids`,
        and `documents` where the part has them; in the order of `window.spans`.

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
        metadata = self._metadata(part)
        position = 0
        for group in range(metadata.num_row_groups):
            num_rows = metadata.row_group(group).num_rows
            if first < position + num_rows and position < last:
                begin = max(first - position, 0)
                yield self._group(part, group, position).slice(begin, last - position - begin)
            position += num_rows

    def _read_metadata(self, part: int) -> pq.FileMetaData:
        with open_part(self._uris[part]) as file:
            return file.metadata

    def _group(self, part: int, group: int, position: int) -> pa.Table:
        """A row group, which begins at row `position` of its part."""
        if (part, group) in self._groups:
            self._groups.move_to_end((part, group))
            return self._groups[part, group]
        with open_part(self._uris[part], self._metadata(part)) as file:
            columns = [name for name in _WANTED if name in file.schema_arrow.names]
            table = file.read_row_group(group, columns=columns, use_threads=False)
        rows = np.arange(position, position + table.num_rows)
        table = table.append_column("row", pa.array(rows))
        table = table.append_column("part", pa.array(np.full_like(rows, part)))
        self._groups[part, group] = table
        self._num_bytes += table.nbytes
        while self._num_bytes > _CACHE_BYTES and len(self._groups) > 1:
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
