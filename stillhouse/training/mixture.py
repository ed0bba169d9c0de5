"""Which data set each draw of a lane comes from: fixed weights, exact shares, by arithmetic.

Draws come in cycles of 256. With cumulative weights C_0 = 0, ..., C_D = 1, the first k cycles of a
lane hold

    floor(256 k C_i) - floor(256 k C_(i-1))

draws from data set i, so its share is off by less than one draw however long the training; inside
a cycle they stand in an order keyed by (seed, lane, cycle).
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from stillhouse.errors import SpecError

_CYCLE = 256
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
        self._shares = [sum(exact[:i], Fraction(0)) / sum(exact) for i in range(len(exact) + 1)]

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
        share = self._shares[dataset + 1] - self._shares[dataset]
        cycles = range(int((position + 2) / (share * _CYCLE)) + 2)  # the last one is beyond it
        cycle = bisect_right(cycles, position, key=lambda k: self._counts(k)[dataset]) - 1
        found = np.flatnonzero(self._cycle(lane, cycle) == dataset)
        return cycle * _CYCLE + int(found[position - self._counts(cycle)[dataset]])

    def _counts(self, cycle: int) -> list[int]:
        """Draws from each data set in a lane's first `cycle` cycles."""
        edges = [math.floor(cycle * _CYCLE * share) for share in self._shares]
        return [after - before for before, after in pairwise(edges)]

    def _cycle(self, lane: int, cycle: int) -> NDArray[np.int64]:
        """The data sets of a cycle's draws: int64 [256]."""
        quotas = np.subtract(self._counts(cycle + 1), self._counts(cycle))
        datasets = np.repeat(np.arange(self._num_datasets), quotas)
        return np.random.default_rng([_DRAWS, self._seed, lane, cycle]).permutation(datasets)
