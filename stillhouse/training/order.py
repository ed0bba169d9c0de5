"""The order of training samples: fixed by (seed, epoch, lanes, window), for any number of workers.

1. The parts of a data set are permuted by (seed, epoch) and concatenated to one line of N rows.
2. The line is cut in V **lanes**; lane v is the rows [vN/V, (v+1)N/V) (rounded down).
3. Inside a lane, rows are shuffled in **windows** by (seed, epoch, lane, window).
4. Global batch s takes the next `global_batch / V` rows of every lane, in the order of lanes.

Every lane counts its own epochs: after its last row it continues with its interval of the next
epoch's line. Where V does not divide N, some lanes have one row more and reach their next epoch one
row later; no row is dropped, padded or repeated in an epoch.

A mixture of data sets has lanes in each of them, and a fixed sequence of draws (`Mixture`).

The state is the number of samples consumed; everything else is arithmetic on the parts' row
counts. Memory: a few integers a part, however many rows they have.
"""

import hashlib
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from heapq import heapify, heappop, heappush
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.errors import InputError, SpecError
from stillhouse.fingerprint import fingerprint

ORDER_VERSION = 2
NO_SAMPLES = bytes(32)
_MAX_LANES = 64
_WINDOW_TOKENS = 1 << 28  # of all windows: 512 MB of 2-byte tokens, over all workers
_PARTS, _ROWS, _DRAWS = 0, 1, 2  # first word of a random generator's key
_CYCLE = 256


def chain(previous: bytes, samples: NDArray[np.int64]) -> bytes:
    """SHA-256 over the previous digest (at first `NO_SAMPLES`) and a step's samples [B, 2].

    A sample is the index of its part and its row, both as little-endian int64.
    """
    return hashlib.sha256(previous + samples.astype("<i8").tobytes()).digest()


@dataclass(frozen=True, slots=True)
class Span:
    """Rows [first, last) of a part, which is numbered over all data sets."""

    part: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Window:
    """Neighbouring rows of a lane that are shuffled together, and fetched together.

    Attributes:
        start: rows of the data set before it in its lane, over all epochs.
        seed: of the order.
        spans: its rows, in the line's order.
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
        return sum(span.last - span.first for span in self.spans)

    @property
    def end(self) -> int:
        """`start` of the next window."""
        return self.start + self.num_rows

    def permutation(self) -> NDArray[np.int64]:
        """int64 [num_rows]: indices of its rows in shuffled order."""
        key = [_ROWS, self.seed, self.dataset, self.epoch, self.lane, self.index]
        return np.random.default_rng(key).permutation(self.num_rows)

    def samples(self) -> NDArray[np.int64]:
        """int64 [num_rows, 2]: part and row, in the line's order."""
        parts = [np.full(span.last - span.first, span.part, np.int64) for span in self.spans]
        rows = [np.arange(span.first, span.last, dtype=np.int64) for span in self.spans]
        return np.stack([np.concatenate(parts), np.concatenate(rows)], axis=1)


@dataclass(frozen=True, slots=True)
class Rows:
    """A data set's row counts by part, and its weight in a mixture."""

    part_rows: Sequence[int]
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class _Line:
    """The parts in an epoch's order: their indices [P], and the first row of each [P + 1]."""

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
    """The order of all samples; see the module's text.

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
        """JSON values that determine the order."""
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
        """The neighbouring lanes of a worker, so that the workers' rows in order of rank are the
        global batch. Some have one lane more where the workers do not divide the lanes.
        """
        return range(rank * self.lanes // num_workers, (rank + 1) * self.lanes // num_workers)

    def lane_rows(self, dataset: int, lane: int) -> int:
        """Rows of a lane in an epoch."""
        total = self._num_rows[dataset]
        return total * (lane + 1) // self.lanes - total * lane // self.lanes

    def window_at(self, dataset: int, lane: int, position: int) -> Window:
        """The window of the `position`-th row of a data set's lane, counted over all epochs."""
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

        The first windows of the lanes shrink from a whole one to a half, so that not all lanes need
        their next window in the same step.
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
        """The line of an epoch; two are cached, as lanes cross the border one after another."""
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
        """The windows that lanes need in steps [step, until), in the order of first use."""
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


class Mixture:
    """The data set of each draw of a lane: fixed weights and exact shares, by arithmetic.

    Draws come in cycles of 256. The first k cycles of a lane hold n_i draws from data set i, by
    descending weight w_i:

        n_i = round(left_i w_i / (w_i + w_(i+1) + ...)),  left_0 = 256 k,  left_(i+1) = left_i - n_i

    Each n_i only grows with k, they add up to 256 k, and rounding shifts a share by at most half a
    draw. Inside a cycle draws are shuffled by (seed, lane, cycle).

    Raises:
        SpecError: a weight that is not positive.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        exact = [Fraction(weight) for weight in weights]
        if min(exact) <= 0:
            raise SpecError(f"weights of data sets must be positive, not {list(weights)}")
        self._seed, self._num_datasets = seed, len(exact)
        self._shares = [weight / sum(exact) for weight in exact]
        self._order = sorted(range(len(exact)), key=lambda i: -exact[i])
        left = [sum((exact[i] for i in self._order[n:]), Fraction(0)) for n in range(len(exact))]
        self._of_the_rest = [exact[i] / rest for i, rest in zip(self._order, left, strict=True)]

    def draws(
        self, lane: int, first: int, count: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Draws [first, first + count) of a lane: int64 [count] data sets and positions in them."""
        if self._num_datasets == 1:
            return np.zeros(count, np.int64), np.arange(first, first + count)
        cycles = range(first // _CYCLE, (first + count - 1) // _CYCLE + 1)
        datasets = np.concatenate([self._cycle(lane, cycle) for cycle in cycles])
        positions = np.empty_like(datasets)
        for i, before in enumerate(self._counts(cycles.start)):
            mine = datasets == i
            positions[mine] = before + np.arange(mine.sum())
        begin = first - cycles.start * _CYCLE
        return datasets[begin : begin + count], positions[begin : begin + count]

    def num_drawn(self, dataset: int, lane: int, draws: int) -> int:
        """The number of a lane's first `draws` draws that are from a data set."""
        if self._num_datasets == 1:
            return draws
        cycle, rest = divmod(draws, _CYCLE)
        in_cycle = int((self._cycle(lane, cycle)[:rest] == dataset).sum())
        return self._counts(cycle)[dataset] + in_cycle

    def draw_of(self, dataset: int, lane: int, position: int) -> int:
        """The draw of a lane that takes the `position`-th row of a data set."""
        if self._num_datasets == 1:
            return position
        beyond = (position + 2 + self._num_datasets) / (self._shares[dataset] * _CYCLE)
        cycles = range(int(beyond) + 2)
        cycle = bisect_right(cycles, position, key=lambda k: self._counts(k)[dataset]) - 1
        found = np.flatnonzero(self._cycle(lane, cycle) == dataset)
        return cycle * _CYCLE + int(found[position - self._counts(cycle)[dataset]])

    def _counts(self, cycle: int) -> list[int]:
        """Draws from each data set in the first `cycle` cycles of a lane."""
        counts, left = [0] * self._num_datasets, cycle * _CYCLE
        for dataset, share in zip(self._order, self._of_the_rest, strict=True):
            counts[dataset] = math.floor(left * share + Fraction(1, 2))
            left -= counts[dataset]
        return counts

    def _cycle(self, lane: int, cycle: int) -> NDArray[np.int64]:
        """The data sets of a cycle's draws: int64 [256]."""
        quotas = np.subtract(self._counts(cycle + 1), self._counts(cycle))
        datasets = np.repeat(np.arange(self._num_datasets), quotas)
        return np.random.default_rng([_DRAWS, self._seed, lane, cycle]).permutation(datasets)


def default_lanes(global_batch: int, num_rows: int) -> int:
    """The largest divisor of the global batch up to 64 and up to the rows of the smallest set."""
    most = min(_MAX_LANES, num_rows, global_batch)
    return max(n for n in range(1, most + 1) if global_batch % n == 0)


def default_window(lanes: int, sequence_length: int, num_datasets: int = 1) -> int:
    """Rows of a window: 2^28 tokens, shared by all lanes of all data sets."""
    return max(1, _WINDOW_TOKENS // (lanes * sequence_length * num_datasets))


def check_workers(order: SampleOrder, num_workers: int) -> None:
    """Check that the lanes can be shared out equally.

    Raises:
        SpecError: they cannot; names the numbers of workers that can.
    """
    if order.lanes % num_workers:
        fits = [n for n in range(1, order.lanes + 1) if order.lanes % n == 0]
        raise SpecError(
            f"`compute.trainers` {num_workers} does not divide `global_batch` "
            f"{order.global_batch} on {order.lanes} lanes: use one of {fits}"
        )
