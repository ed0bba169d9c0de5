"""The data set of each draw in a mixture: by fixed weights, or by weights that change.

Every lane of a training takes as many sequences from a data set as every other. With fixed weights
the counts follow from a formula (`Mixture`); with weights that change they are those of a plan
(`ScheduledMixture`).
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from stillhouse.errors import SpecError
from stillhouse.training.schedule import Plan, Schedule, plan_draws

_DRAWS = 2  # first word of a random generator's key; others are in `order`
_CYCLE = 256


class Mixture:
    """The data set of each draw of a lane: fixed weights and exact shares, by arithmetic.

    Draws come in cycles of 256. The first k cycles of a lane hold n_i draws from data set i, by
    descending weight w_i:

        n_i = round(left_i w_i / (w_i + w_(i+1) + ...)),  left_0 = 256 k,  left_(i+1) = left_i - n_i

    Each n_i only grows with k, they add up to 256 k, and rounding shifts a share by at most half a
    draw. Inside a cycle draws are shuffled by (seed, lane, cycle).

    Args:
        weights: of the data sets; one of weight 0 is never drawn.
        key: further words of the random generator's key.
        num_draws: where the last cycle ends; default: never.

    Raises:
        SpecError: a negative weight, or none above 0.
    """

    def __init__(
        self,
        weights: Sequence[float],
        seed: int,
        key: tuple[int, ...] = (),
        num_draws: int | None = None,
    ) -> None:
        exact = [Fraction(weight) for weight in weights]
        if min(exact) < 0 or not any(exact):
            raise SpecError(f"weights of data sets must be positive, not {list(weights)}")
        self._seed, self._key, self.num_draws = seed, key, num_draws
        self._num_datasets = len(exact)
        self._shares = [weight / sum(exact) for weight in exact]
        self._order = sorted(range(len(exact)), key=lambda i: -exact[i])
        left = [sum((exact[i] for i in self._order[n:]), Fraction(0)) for n in range(len(exact))]
        self._of_the_rest = [
            exact[i] / rest if rest else Fraction(0)
            for i, rest in zip(self._order, left, strict=True)
        ]

    @property
    def asked(self) -> list[float]:
        """The share of each data set that the weights ask for."""
        return [float(share) for share in self._shares]

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
        in_cycle = int((self._cycle(lane, cycle)[:rest] == dataset).sum()) if rest else 0
        return self._counts(cycle)[dataset] + in_cycle

    def draw_of(self, dataset: int, lane: int, position: int) -> int | None:
        """The draw of a lane that takes the `position`-th row of a data set; None: none does."""
        if self._num_datasets == 1:
            return position
        if not self._shares[dataset]:
            return None
        beyond = (position + 2 + self._num_datasets) / (self._shares[dataset] * _CYCLE)
        cycles = range(int(beyond) + 2)
        cycle = bisect_right(cycles, position, key=lambda k: self._counts(k)[dataset]) - 1
        found = np.flatnonzero(self._cycle(lane, cycle) == dataset)
        return cycle * _CYCLE + int(found[position - self._counts(cycle)[dataset]])

    def _counts(self, cycle: int) -> list[int]:
        """Draws from each data set in the first `cycle` cycles of a lane."""
        counts, left = [0] * self._num_datasets, cycle * _CYCLE
        if self.num_draws is not None:
            left = min(left, self.num_draws)
        for dataset, share in zip(self._order, self._of_the_rest, strict=True):
            counts[dataset] = math.floor(left * share + Fraction(1, 2))
            left -= counts[dataset]
        return counts

    def _cycle(self, lane: int, cycle: int) -> NDArray[np.int64]:
        """The data sets of a cycle's draws: int64 [256], fewer in the last cycle."""
        quotas = np.subtract(self._counts(cycle + 1), self._counts(cycle))
        datasets = np.repeat(np.arange(self._num_datasets), quotas)
        key = [_DRAWS, self._seed, lane, cycle, *self._key]
        return np.random.default_rng(key).permutation(datasets)


class ScheduledMixture:
    """The same draws for weights that change: each stretch of a plan is a `Mixture` of its counts.

    Attributes:
        num_draws: where the plan ends, and draws with it.
    """

    def __init__(self, plan: Plan, seed: int) -> None:
        self.plan, self._seed = plan, seed
        self.num_draws = int(plan.starts[-1])
        self._mixture = lru_cache(64)(self._mixture_of)

    @property
    def asked(self) -> list[float]:
        """The mean share of each data set that the weights ask for."""
        return self.plan.asked

    def draws(
        self, lane: int, first: int, count: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """See `Mixture`."""
        datasets: list[NDArray[np.int64]] = []
        positions: list[NDArray[np.int64]] = []
        end = first + count
        while first < end:
            stretch = self._stretch(self.plan.starts, first)
            start, last = self.plan.starts[stretch : stretch + 2].tolist()
            took = min(end, last) - first
            found, inside = self._mixture(stretch).draws(lane, first - start, took)
            datasets.append(found)
            positions.append(inside + self.plan.counts[stretch][found])
            first += took
        return np.concatenate(datasets), np.concatenate(positions)

    def num_drawn(self, dataset: int, lane: int, draws: int) -> int:
        """See `Mixture`."""
        stretch = self._stretch(self.plan.starts, draws)
        before = int(self.plan.counts[stretch, dataset])
        inside = draws - int(self.plan.starts[stretch])
        return before + (self._mixture(stretch).num_drawn(dataset, lane, inside) if inside else 0)

    def draw_of(self, dataset: int, lane: int, position: int) -> int | None:
        """See `Mixture`."""
        before = self.plan.counts[:, dataset]
        stretch = self._stretch(before, position)
        if stretch == len(self.plan.shares):
            return None
        inside = self._mixture(stretch).draw_of(dataset, lane, position - int(before[stretch]))
        assert inside is not None
        return int(self.plan.starts[stretch]) + inside

    @staticmethod
    def _stretch(before: NDArray[np.int64], value: int) -> int:
        return int(np.searchsorted(before, value, side="right")) - 1

    def _mixture_of(self, stretch: int) -> Mixture:
        (start, end), counts = self.plan.starts[stretch : stretch + 2].tolist(), self.plan.counts
        quotas = (counts[stretch + 1] - counts[stretch]).tolist()
        return Mixture(quotas, self._seed, (start,), end - start)


def make_mixture(
    weights: Sequence[float | Schedule],
    limits: Sequence[int | None],
    *,
    seed: int,
    lanes: int,
    num_steps: int | None,
    rows_per_lane: int,
) -> Mixture | ScheduledMixture:
    """The mixture of a training: of fixed weights, unless one changes or a limit is reached.

    Args:
        limits: the most draws a lane may take from each data set.
        num_steps: of the training; needed for weights that change, and for limits.
    """
    fixed = [weight for weight in weights if not isinstance(weight, Schedule)]
    limited = [(i, limit) for i, limit in enumerate(limits) if limit is not None]
    if len(fixed) == len(weights):
        mixture = Mixture(fixed, seed)
        if not limited:
            return mixture
        assert num_steps is not None
        draws = num_steps * rows_per_lane
        if all(mixture.num_drawn(i, v, draws) <= most for i, most in limited for v in range(lanes)):
            return mixture
    assert num_steps is not None
    plan = plan_draws(weights, limits, num_steps=num_steps, rows_per_lane=rows_per_lane)
    return ScheduledMixture(plan, seed)
