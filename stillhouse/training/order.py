"""The order of training samples: fixed by (seed, epoch, lanes, window), for any number of workers.

1. The parts of a data set are permuted by (seed, epoch) and concatenated to one line of N rows.
2. The line is cut in V **lanes**; lane v is the rows [vN/V, (v+1)N/V) (rounded down).
3. Inside a lane, rows are shuffled in **windows** by (seed, epoch, lane, window).
4. Global batch s takes the next `global_batch / V` rows of every lane, in the order of lanes.

Every lane counts its own epochs: after its last row it continues with its interval of the next
epoch's line. Where V does not divide N, some lanes have one row more and reach their next epoch one
row later; no row is dropped, padded or repeated in an epoch.

A mixture of data sets has lanes in each of them, and a fixed sequence of draws (`mixture`).

The state is the number of samples consumed; everything else is arithmetic on the parts' row
counts. Memory: a few integers a part, however many rows they have.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from heapq import heapify, heappop, heappush
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.errors import InputError, SpecError
from stillhouse.fingerprint import fingerprint
from stillhouse.storage.task import identity
from stillhouse.training.mixture import Mixture, make_mixture
from stillhouse.training.schedule import Schedule

ORDER_VERSION = 2
NO_SAMPLES = bytes(32)
_MAX_LANES = 64
_WINDOW_TOKENS = 1 << 28  # of all windows: 512 MB of 2-byte tokens, over all workers
_PARTS, _ROWS = 0, 1  # first word of a random generator's key; `mixture` has another


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
    """A data set's row counts by part, and its weight in a mixture.

    Attributes:
        max_epochs: after which its weight is 0; None: never.
    """

    part_rows: Sequence[int]
    weight: float | Schedule = 1.0
    max_epochs: float | None = None


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
        num_steps: of the training; needed for weights that change and for `max_epochs`.

    Raises:
        SpecError: lanes that do not divide the global batch, or a weight that is not positive.
        InputError: a data set with fewer rows than lanes.
    """

    def __init__(
        self,
        datasets: Sequence[Rows],
        *,
        global_batch: int,
        seed: int,
        lanes: int,
        window: int,
        num_steps: int | None = None,
    ) -> None:
        if global_batch % lanes:
            raise SpecError(f"`lanes` {lanes} does not divide `global_batch` {global_batch}")
        self.global_batch, self.seed, self.lanes, self.window = global_batch, seed, lanes, window
        self.rows_per_lane = global_batch // lanes
        self._part_rows = [np.asarray(rows.part_rows, np.int64) for rows in datasets]
        self._num_rows = [int(rows.sum()) for rows in self._part_rows]
        self._first_part = np.cumsum([0, *map(len, self._part_rows)]).tolist()
        self._lines: dict[int, list[_Line]] = {i: [] for i in range(len(datasets))}
        self._datasets, self.num_datasets, self._num_steps = datasets, len(datasets), num_steps
        for i, rows in enumerate(self._num_rows):
            if rows < lanes:
                raise InputError(
                    f"data set {i} has {rows} sequences, fewer than the {lanes} lanes: give more "
                    "data, or set `lanes` to a smaller divisor of `global_batch`"
                )
        self.mixture = make_mixture(
            [rows.weight for rows in datasets],
            [self.limit(i, rows.max_epochs) for i, rows in enumerate(datasets)],
            seed=seed,
            lanes=lanes,
            num_steps=num_steps,
            rows_per_lane=self.rows_per_lane,
        )

    def limit(self, dataset: int, epochs: float | None) -> int | None:
        """Rows that every lane of a data set has in so many epochs."""
        if epochs is None:
            return None
        return int(Fraction(epochs) * (self._num_rows[dataset] // self.lanes))

    def rows_before(self, dataset: int) -> int:
        """Rows of the data sets before one."""
        return sum(self._num_rows[:dataset])

    def num_drawn(self, dataset: int, num_steps: int) -> list[int]:
        """Rows of a data set in the first steps, by lane."""
        draws = num_steps * self.rows_per_lane
        return [self.mixture.num_drawn(dataset, lane, draws) for lane in range(self.lanes)]

    def describe(self) -> dict[str, Any]:
        """JSON values that determine the order."""
        described = {
            "version": ORDER_VERSION,
            "global_batch": self.global_batch,
            "seed": self.seed,
            "lanes": self.lanes,
            "window": self.window,
            "weights": [identity(rows.weight) for rows in self._datasets],
            "part_rows": fingerprint([rows.tolist() for rows in self._part_rows]),
        }
        if isinstance(self.mixture, Mixture):
            return described
        limits = [rows.max_epochs for rows in self._datasets]
        return described | {"max_epochs": limits, "num_steps": self._num_steps}

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
            for dataset in range(self.num_datasets):
                position = self.mixture.num_drawn(dataset, lane, step * self.rows_per_lane)
                heap += self._need(dataset, lane, position)
        heapify(heap)
        while heap:
            needed, lane, dataset, position = heappop(heap)
            if until is not None and needed >= until:
                return
            window = self.window_at(dataset, lane, position)
            yield window
            for need in self._need(dataset, lane, window.end):
                heappush(heap, need)

    def _need(self, dataset: int, lane: int, position: int) -> list[tuple[int, int, int, int]]:
        """When a row is needed, if it is: its step, lane, data set and position."""
        draw = self.mixture.draw_of(dataset, lane, position)
        return [] if draw is None else [(draw // self.rows_per_lane, lane, dataset, position)]


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
