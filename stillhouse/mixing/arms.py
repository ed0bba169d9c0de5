"""Arms as endless streams of rows, read from any position and ahead of time.

Row i of epoch e of an arm: its row groups are in an order keyed by (seed, arm, epoch), the rows in
each in an order keyed by the row group too. So the number of an arm's rows drawn before is all the
state of its stream, and it is the same for any number of workers.

A part is opened when its arm is first drawn. Row groups are cached up to 32 MB over all arms, so
memory does not grow with the number of arms; footers of a few kB stay. Reading ahead goes by
positions in a stream, never by a guess of draws, so nothing fetched can be stale.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from threading import Lock
from time import perf_counter
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from stillhouse.fingerprint import fingerprint
from stillhouse.storage.artifact import Store
from stillhouse.storage.parquet import open_part
from stillhouse.storage.task import Place

Ids: TypeAlias = NDArray[np.int32]
ROW_GROUP = 256
_CACHE_BYTES = 32 << 20
_CACHED_ORDERS = 1024
_THREADS = 4


@dataclass(frozen=True, slots=True)
class ArmPart:
    """An arm's rows: its name, the part that holds them, and their number."""

    name: str
    path: Place[str]
    num_rows: int
    sha256: str = ""


class Row(NamedTuple):
    """A row in tokens: int32 [n] input, int32 [m] target; a target's row may have choices, of which
    `answer` is the right one's index.
    """

    input_ids: Ids
    target_ids: Ids
    choices: tuple[Ids, ...] = ()
    answer: int = -1


_Key: TypeAlias = tuple[int, int]
"""Arm and row group."""


class ArmReader:
    """Rows by arm and position in its stream; `seed` determines the order of rows."""

    def __init__(self, store: Store, parts: Sequence[ArmPart], *, seed: int) -> None:
        self.parts, self._seed = list(parts), seed
        self._uris = [store.path(part.path) for part in parts]
        self._keys = [int(fingerprint(["arm", part.name])[:15], 16) for part in parts]
        self._footers: dict[int, pq.FileMetaData] = {}
        self._groups: OrderedDict[_Key, tuple[list[Row], int]] = OrderedDict()
        self._pending: dict[_Key, Future[tuple[list[Row], int]]] = {}
        self._num_bytes, self.wait_s = 0, 0.0
        self._lock = Lock()
        self._threads = ThreadPoolExecutor(_THREADS, "arms")
        self._order = lru_cache(_CACHED_ORDERS)(self._make_order)

    @property
    def opened(self) -> list[int]:
        """The arms whose parts have been opened, ascending."""
        return sorted(self._footers)

    def rows(self, arm: int, first: int, count: int) -> list[Row]:
        """Rows [first, first + count) of an arm's stream; waits for those not read yet.

        Raises:
            ArtifactError: the part is missing or broken.
        """
        return [self._group((arm, group))[row] for group, row in self._addresses(arm, first, count)]

    def ahead(self, arm: int, first: int, count: int) -> None:
        """Begin to read these rows in the background."""
        for group in dict.fromkeys(group for group, _ in self._addresses(arm, first, count)):
            key = (arm, group)
            if key not in self._groups and key not in self._pending:
                self._pending[key] = self._threads.submit(self._read, arm, group)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _addresses(self, arm: int, first: int, count: int) -> Iterator[tuple[int, int]]:
        """Row group, and row in it, of each position."""
        size = self.parts[arm].num_rows
        for position in range(first, first + count):
            epoch, row = divmod(position, size)
            order, starts = self._order(arm, epoch)
            place = int(np.searchsorted(starts, row, side="right")) - 1
            group = int(order[place])
            rng = np.random.default_rng([self._seed, self._keys[arm], epoch, 1 + group])
            shuffled = rng.permutation(min(ROW_GROUP, size - group * ROW_GROUP))
            yield group, int(shuffled[row - starts[place]])

    def _make_order(self, arm: int, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The epoch's row groups in order, and the first row of each."""
        size = self.parts[arm].num_rows
        groups = -(-size // ROW_GROUP)
        order = np.random.default_rng([self._seed, self._keys[arm], epoch]).permutation(groups)
        sizes = np.minimum(ROW_GROUP, size - order * ROW_GROUP)
        return order, np.concatenate([[0], np.cumsum(sizes)[:-1]])

    def _group(self, key: _Key) -> list[Row]:
        if key in self._groups:
            self._groups.move_to_end(key)
            return self._groups[key][0]
        started = perf_counter()
        pending = self._pending.pop(key, None)
        rows, num_bytes = self._read(*key) if pending is None else pending.result()
        self.wait_s += perf_counter() - started
        self._groups[key] = rows, num_bytes
        self._num_bytes += num_bytes
        while self._num_bytes > _CACHE_BYTES and len(self._groups) > 1:
            self._num_bytes -= self._groups.popitem(last=False)[1][1]
        return rows

    def _read(self, arm: int, group: int) -> tuple[list[Row], int]:
        """A row group's rows, and their size in bytes."""
        with open_part(self._uris[arm], self._footers.get(arm)) as file:
            with self._lock:
                self._footers[arm] = file.metadata
            table = file.read_row_group(group, use_threads=False)
        inputs, targets = (_lists(table[name]) for name in ("input_ids", "target_ids"))
        return [Row(i, t) for i, t in zip(inputs, targets, strict=True)], table.nbytes


def _lists(column: Any) -> list[Ids]:
    """A column of lists as arrays that share one buffer."""
    whole = column.combine_chunks()
    values = whole.values.to_numpy()
    offsets = whole.offsets.to_numpy()
    return [values[start:end] for start, end in pairwise(offsets)]
