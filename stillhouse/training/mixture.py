"""Which data set each draw of a lane comes from: fixed weights, exact shares, by arithmetic.

Draws come in cycles of 256. The first k cycles of a lane hold n_i draws from data set i, the
largest weight w_i first:

    n_i = round(left_i w_i / (w_i + w_(i+1) + ...)),   left_0 = 256 k,   left_(i+1) = left_i - n_i

Each n_i only grows with k, they add up to 256 k, and each rounding puts a share off by half a draw
at most, however long the training. Inside a cycle draws stand in an order keyed by (seed, lane,
cycle).
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from stillhouse.errors import SpecError

_CYCLE = 256
_HALF = Fraction(1, 2)
_DRAWS = 2  # sets this generator apart from those of the order


class Mixture:
    """Draws of lanes from data sets with these weights, which need not add up to 1.

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
        """How many of a lane's first `draws` draws are from a data set."""
        if self._num_datasets == 1:
            return draws
        cycle, rest = divmod(draws, _CYCLE)
        in_cycle = int((self._cycle(lane, cycle)[:rest] == dataset).sum())
        return self._counts(cycle)[dataset] + in_cycle

    def draw_of(self, dataset: int, lane: int, position: int) -> int:
        """Which draw of a lane takes the `position`-th row of a data set."""
        if self._num_datasets == 1:
            return position
        beyond = (position + 2 + self._num_datasets) / (self._shares[dataset] * _CYCLE)
        cycles = range(int(beyond) + 2)
        cycle = bisect_right(cycles, position, key=lambda k: self._counts(k)[dataset]) - 1
        found = np.flatnonzero(self._cycle(lane, cycle) == dataset)
        return cycle * _CYCLE + int(found[position - self._counts(cycle)[dataset]])

    def _counts(self, cycle: int) -> list[int]:
        """Draws from each data set in a lane's first `cycle` cycles."""
        counts, left = [0] * self._num_datasets, cycle * _CYCLE
        for dataset, share in zip(self._order, self._of_the_rest, strict=True):
            counts[dataset] = math.floor(left * share + _HALF)
            left -= counts[dataset]
        return counts

    def _cycle(self, lane: int, cycle: int) -> NDArray[np.int64]:
        """The data sets of a cycle's draws: int64 [256]."""
        quotas = np.subtract(self._counts(cycle + 1), self._counts(cycle))
        datasets = np.repeat(np.arange(self._num_datasets), quotas)
        return np.random.default_rng([_DRAWS, self._seed, lane, cycle]).permutation(datasets)
