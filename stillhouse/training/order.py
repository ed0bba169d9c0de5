"""The order of training samples: fixed by (seed, epoch, lanes, window), for any number of workers.

1. The parts of a data set are permuted by (seed, epoch) and thought of as one line of N rows.
2. The line is cut in V **lanes**; lane v is the rows [vN/V, (v+1)N/V) (rounded down).
3. Inside a lane, rows are shuffled in **windows** by (seed, epoch, lane, window).
4. Global batch s takes the next `global_batch / V` rows of every lane, lane after lane.

Every lane counts its own epochs: after its last row it goes on with its interval of the next
epoch's line. So where V does not divide N, lanes of one row more come to their next epoch one
step's row later; nothing is dropped, filled up or seen twice in an epoch.

A mixture of data sets has lanes in each of them; which one a lane draws from next is fixed too
(`Mixture`).

The state is the number of samples consumed; everything else is arithmetic on the parts' row
counts. Memory: a few integers a part, whatever their rows.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.errors import InputError, SpecError
from stillhouse.fingerprint import fingerprint
from stillhouse.training.mixture import Mixture

MAX_LANES = 64
ORDER_VERSION = 2
NO_SAMPLES = bytes(32)
_WINDOW_TOKENS = 1 << 28  # all windows together: 512 MB of 2-byte tokens, over all workers
_PARTS, _ROWS = 0, 1  # what a random generator is for; 2 is the mixture's


def chain(previous: bytes, samples: NDArray[np.int64]) -> bytes:
    """SHA-256 over the chain so far (`NO_SAMPLES` at first) and a step's samples [B, 2] in order.

    A sample is its part's index and its row, each as a little-endian int64.
    """
    return hashlib.sha256(previous + samples.astype("<i8").tobytes()).digest()


@dataclass(frozen=True, slots=True)
class Span:
    """Rows [first, last) of a part, given by its index over all data sets."""

    part: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Window:
    """A run of a lane's rows that are shuffled together, and the unit in which they are fetched.

    Attributes:
        dataset, lane, epoch, index: which one it is.
        start: how many rows of the data set the lane has given out before it, over all epochs.
        seed: of the whole order.
        spans: where its rows lie, in the line's order.
    """

    dataset: int
    lane: int
    epoch: int
    index: int
    start: int
    seed: int
    spans: tuple[Span, ...]

    @property
    def num_rows(self) -> int:
        """Its rows."""
        return sum(span.last - span.first for span in self.spans)

    @property
    def end(self) -> int:
        """`start` of the window after it."""
        return self.start + self.num_rows

    def permutation(self) -> NDArray[np.int64]:
        """int64 [num_rows]: which of its rows comes first, second, ..."""
        key = [_ROWS, self.seed, self.dataset, self.epoch, self.lane, self.index]
        return np.random.default_rng(key).permutation(self.num_rows)

    def samples(self) -> NDArray[np.int64]:
        """int64 [num_rows, 2]: part and row of its rows, in the line's order."""
        parts = [np.full(span.last - span.first, span.part, np.int64) for span in self.spans]
        rows = [np.arange(span.first, span.last, dtype=np.int64) for span in self.spans]
        return np.stack([np.concatenate(parts), np.concatenate(rows)], axis=1)


@dataclass(frozen=True, slots=True)
class Rows:
    """A data set as the order knows it: the rows of its parts, in order, and its weight."""

    part_rows: Sequence[int]
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class _Line:
    """The parts in an epoch's order: their indices [P], and where each begins [P + 1]."""

    epoch: int
    parts: NDArray[np.int64]
    starts: NDArray[np.int64]

    def spans(self, first: int, last: int, first_part: int) -> tuple[Span, ...]:
        begin = int(np.searchsorted(self.starts, first, side="right")) - 1
        end = int(np.searchsorted(self.starts, last, side="left"))
        spans: list[Span] = []
        for i in range(begin, end):
            start, stop = int(self.starts[i]), int(self.starts[i + 1])
            low, high = max(first, start) - start, min(last, stop) - start
            if low < high:
                spans.append(Span(first_part + int(self.parts[i]), low, high))
        return tuple(spans)


class SampleOrder:
    """The order itself; see the module's text.

    Args:
        datasets: at least one.
        global_batch: samples a step.
        lanes: divides `global_batch`.
        window: rows shuffled together.

    Raises:
        SpecError: lanes that do not divide the global batch, or a weight that is not positive.
        InputError: a data set with fewer rows than lanes.
    """

    def __init__(
        self, datasets: Sequence[Rows], *, global_batch: int, seed: int, lanes: int, window: int
    ) -> None:
        if global_batch % lanes:
            raise SpecError(f"`lanes` {lanes} does not divide `global_batch` {global_batch}")
        self.global_batch, self.seed, self.lanes, self.window = global_batch, seed, lanes, window
        self.rows_per_lane = global_batch // lanes
        self._part_rows = [np.asarray(rows.part_rows, np.int64) for rows in datasets]
        self._num_rows = [int(rows.sum()) for rows in self._part_rows]
        self._first_part = np.cumsum([0, *map(len, self._part_rows)]).tolist()
        self._lines: dict[int, list[_Line]] = {i: [] for i in range(len(datasets))}
        self._weights = [rows.weight for rows in datasets]
        self.num_datasets = len(datasets)
        self.mixture = Mixture(self._weights, seed)
        for i, rows in enumerate(self._num_rows):
            if rows < lanes:
                raise InputError(
                    f"data set {i} has {rows} sequences, fewer than the {lanes} lanes: give more "
                    "data, or set `lanes` to a smaller divisor of `global_batch`"
                )

    def describe(self) -> dict[str, Any]:
        """What decides the order, as JSON values: equal descriptions give equal orders."""
        return {
            "version": ORDER_VERSION,
            "global_batch": self.global_batch,
            "seed": self.seed,
            "lanes": self.lanes,
            "window": self.window,
            "weights": self._weights,
            "part_rows": fingerprint([rows.tolist() for rows in self._part_rows]),
        }

    def lanes_of(self, rank: int, num_workers: int) -> range:
        """The lanes of a worker: neighbours, so that ranks in order give the global order.

        Where the workers do not divide the lanes, some have one lane more.
        """
        return range(rank * self.lanes // num_workers, (rank + 1) * self.lanes // num_workers)

    def lane_rows(self, dataset: int, lane: int) -> int:
        """Rows of a lane in one epoch."""
        total = self._num_rows[dataset]
        return total * (lane + 1) // self.lanes - total * lane // self.lanes

    def window_at(self, dataset: int, lane: int, position: int) -> Window:
        """The window that holds the `position`-th row, from 0, of a data set's lane."""
        begin = self._num_rows[dataset] * lane // self.lanes
        size = self.lane_rows(dataset, lane)
        epoch, offset = divmod(position, size)
        index, first, last = self._borders(lane, size, offset)
        line = self._line(dataset, epoch)
        return Window(
            dataset=dataset,
            lane=lane,
            epoch=epoch,
            index=index,
            start=epoch * size + first,
            seed=self.seed,
            spans=line.spans(begin + first, begin + last, self._first_part[dataset]),
        )

    def _borders(self, lane: int, size: int, offset: int) -> tuple[int, int, int]:
        """Index, first and last row of the window around `offset` in a lane of `size` rows.

        First windows shrink from a whole to half of one from lane to lane, so that not all lanes
        need their next one in the same step.
        """
        head = self.window - lane * self.window // (2 * self.lanes)
        if size <= self.window:
            return 0, 0, size
        if offset < head:
            return 0, 0, head
        index = (offset - head) // self.window
        first = head + index * self.window
        return index + 1, first, min(first + self.window, size)

    def _line(self, dataset: int, epoch: int) -> _Line:
        """The line of an epoch; the two used last are kept, for lanes pass a border by turns."""
        kept = self._lines[dataset]
        found = next((line for line in kept if line.epoch == epoch), None)
        if found is None:
            rows = self._part_rows[dataset]
            key = [_PARTS, self.seed, dataset, epoch]
            parts = np.random.default_rng(key).permutation(len(rows))
            found = _Line(epoch, parts, np.concatenate([[0], np.cumsum(rows[parts])]))
            self._lines[dataset] = [found, *kept[:1]]
        return found

    def windows(self, lanes: range, step: int, until: int | None = None) -> Iterator[Window]:
        """The windows that these lanes need from a step on (before `until`), in order of need."""
        heap: list[tuple[int, int, int, int]] = []
        for lane in lanes:
            for dataset in range(len(self._weights)):
                position = self.mixture.num_drawn(dataset, lane, step * self.rows_per_lane)
                heap.append(self._need(dataset, lane, position))
        heapify(heap)
        while heap:
            needed, lane, dataset, position = heappop(heap)
            if until is not None and needed >= until:
                return
            window = self.window_at(dataset, lane, position)
            yield window
            heappush(heap, self._need(dataset, lane, window.end))

    def _need(self, dataset: int, lane: int, position: int) -> tuple[int, int, int, int]:
        step = self.mixture.draw_of(dataset, lane, position) // self.rows_per_lane
        return step, lane, dataset, position


def default_lanes(global_batch: int, num_rows: int) -> int:
    """The largest divisor of the global batch up to 64, and up to the rows of the smallest set."""
    most = min(MAX_LANES, num_rows, global_batch)
    return max(n for n in range(1, most + 1) if global_batch % n == 0)


def default_window(lanes: int, sequence_length: int, num_datasets: int = 1) -> int:
    """Rows of a window: as many as 2^28 tokens hold, shared by all lanes of all data sets."""
    return max(1, _WINDOW_TOKENS // (lanes * sequence_length * num_datasets))


def check_workers(order: SampleOrder, num_workers: int) -> None:
    """Refuse a number of workers that the lanes do not divide into.

    Raises:
        SpecError: naming the numbers that would do.
    """
    if order.lanes % num_workers:
        fits = [n for n in range(1, order.lanes + 1) if order.lanes % n == 0]
        raise SpecError(
            f"`compute.trainers` {num_workers} does not divide `global_batch` "
            f"{order.global_batch} on {order.lanes} lanes: use one of {fits}"
        )
