"""Weights that change during a training, and the counts that follow from them.

A plan cuts the D = steps x rows draws of a lane into **stretches** of constant shares: one begins
where a weight changes, or where a data set is exhausted.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.storage.task import identity

_RAMP_DRAWS, _MOST_RAMPS = 16, 1 << 12
_NOISE = 1e-6  # of sums of floats: less than a draw


@dataclass(frozen=True, slots=True)
class Schedule:
    """A weight that changes during the training.

    Attributes:
        points: (fraction of the training, weight), ascending from fraction 0.
        linear: whether the weight moves evenly between points; else it jumps at each.
    """

    points: tuple[tuple[float, float], ...]
    linear: bool = False

    def at(self, fraction: float) -> float:
        """The weight at a fraction of the training."""
        last = bisect_right(self.points, fraction, key=lambda point: point[0]) - 1
        (start, weight), *later = self.points[last : last + 2]
        if not self.linear or not later:
            return weight
        end, aim = later[0]
        return weight + (aim - weight) * ((fraction - start) / (end - start))


@dataclass(frozen=True, slots=True)
class Share:
    """What a data set is to have of a mixture.

    Attributes:
        max_epochs: how often its sequences may be seen; None: without limit.
        reweight: after which its weight is 0; else no training needs more of it.
    """

    weight: float | Schedule = 1.0
    max_epochs: float | None = None
    reweight: bool = False

    @property
    def one_pass(self) -> float:
        """The share of its tokens that one pass over the data sets takes."""
        return 1.0 if self.max_epochs is None else min(1.0, self.max_epochs)

    @property
    def limit(self) -> float | None:
        """Epochs after which its weight is 0."""
        return self.max_epochs if self.reweight else None

    def identity(self) -> Any:
        """The weight alone, unless a limit could change the order."""
        weight = identity(self.weight)
        return weight if self.limit is None else {"weight": weight, "max_epochs": self.limit}


EVEN = Share()


@dataclass(frozen=True, slots=True)
class Plan:
    """The counts of a mixture whose weights change, the same in every lane.

    Attributes:
        starts: int64 [S + 1]: the first draw of each stretch, and the end of the last; before the
            training's own end if by then all data sets of a weight are exhausted.
        shares: float64 [S, K], of the data sets in each stretch.
        counts: int64 [S + 1, K]: draws from each data set before each stretch, and in all.
        asked: mean shares that the weights ask for, limits aside.
    """

    starts: NDArray[np.int64]
    shares: NDArray[np.float64]
    counts: NDArray[np.int64]
    asked: list[float]


def plan_draws(
    weights: Sequence[float | Schedule],
    limits: Sequence[int | None],
    *,
    num_steps: int,
    rows_per_lane: int,
) -> Plan:
    """Share out the draws of a lane by weights that change.

    A point of a schedule is moved to the nearest step. Linear weights are a staircase: stretches of
    16 draws, or of 1/4,096 of the training if that is more, have the weights of their middle.
    Counts are rounded at the ends of stretches to the largest remainders, earlier roundings
    included, so that the rounding of one never adds to that of another.

    Args:
        limits: the most draws a lane may take from each data set; from there on its weight is 0.

    Cost: tens of microseconds a stretch.
    """
    borders, rows = _stretches(weights, num_steps, rows_per_lane)
    shares = rows / _sums(rows)
    asked = np.add.accumulate(np.diff(borders)[:, None] * shares)[-1] / borders[-1]
    sharing = _Sharing(limits)
    for end, row in zip(borders[1:].tolist(), rows, strict=True):
        if not sharing.advance(end, row):
            break
    return sharing.plan(asked.tolist())


class _Sharing:
    """The stretches so far: draws `given` from each data set, and `debt`, those still owed."""

    def __init__(self, limits: Sequence[int | None]) -> None:
        self._most = np.array([np.inf if limit is None else limit for limit in limits])
        self._full = np.zeros(len(limits), np.bool_)
        self._debt = np.zeros(len(limits))
        self._starts, self._shares = [0], list[NDArray[np.float64]]()
        self._counts = [np.zeros(len(limits), np.int64)]

    def advance(self, end: int, weights: NDArray[np.float64]) -> bool:
        """Share out the draws up to `end`; False if all data sets of a weight are exhausted."""
        while self._starts[-1] < end:
            left = np.where(self._full, 0.0, weights)
            if not left.any():
                return False
            share = left / _sums(left)
            room = np.where(share > 0, self._most - self._counts[-1], 0.0)
            length = self._until_full(share, room, end - self._starts[-1])
            if length:
                wanted = self._debt + share * length
                quota = _rounded(np.where(share > 0, wanted, 0.0), room, length)
                self._debt = wanted - quota
                self._starts.append(self._starts[-1] + length)
                self._shares.append(share)
                self._counts.append(self._counts[-1] + quota)
        return True

    def _until_full(
        self, share: NDArray[np.float64], room: NDArray[np.float64], length: int
    ) -> int:
        """Draws until a data set is exhausted, at most `length`; notes which ones are."""
        over = (share > 0) & (self._debt + share * length > room + _NOISE)
        if over.any():
            draws = np.full(len(share), np.inf)
            left = (room - self._debt)[over] / share[over]
            draws[over] = np.maximum(0, np.floor(left + _NOISE))
            self._full |= draws == draws.min()
            length = int(draws.min())
        if _sums(room)[0] < length:
            self._full |= share > 0
            length = int(_sums(room)[0])
        return length

    def plan(self, asked: list[float]) -> Plan:
        shares = np.array(self._shares).reshape(len(self._shares), len(asked))
        return Plan(np.array(self._starts), shares, np.array(self._counts), asked)


def _sums(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums over the last axis [..., 1], added one by one: equal bits on every machine."""
    return np.add.accumulate(values, axis=-1)[..., -1:]


def _rounded(
    wanted: NDArray[np.float64], room: NDArray[np.float64], total: int
) -> NDArray[np.int64]:
    """Whole numbers from 0 to `room` near `wanted` with a sum of `total`, at most that of `room`.

    They are rounded down, and the largest remainders then up.
    """
    quota = np.minimum(np.maximum(0, np.floor(wanted)), room)
    while (left := total - int(quota.sum())) > 0:
        may = np.where(quota < room, wanted - quota, -np.inf)
        first = np.argsort(-may, kind="stable")[:left]
        quota[first] += quota[first] < room[first]
    while (beyond := int(quota.sum()) - total) > 0:
        may = np.where(quota > 0, wanted - quota, np.inf)
        first = np.argsort(may, kind="stable")[:beyond]
        quota[first] -= quota[first] > 0
    return quota.astype(np.int64)


def _stretches(
    weights: Sequence[float | Schedule], num_steps: int, rows_per_lane: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """First draws of stretches, and the end, int64 [S + 1]; weights in each, float64 [S, K]."""
    end = num_steps * rows_per_lane
    schedules = [
        weight if isinstance(weight, Schedule) else Schedule(((0.0, float(weight)),))
        for weight in weights
    ]
    moved = [
        {math.floor(at * num_steps + 0.5) * rows_per_lane: weight for at, weight in one.points}
        for one in schedules
    ]
    jumps = sorted({0, end}.union(*moved))
    ramp = max(_RAMP_DRAWS, -(-end // _MOST_RAMPS))
    starts: list[NDArray[np.int64]] = []
    for first, last in pairwise(jumps):
        ramps = any(
            s.linear and max(points) > first for s, points in zip(schedules, moved, strict=True)
        )
        starts.append(np.arange(first, last, ramp if ramps else last - first))
    borders = np.append(np.concatenate(starts), end)
    rows = [_over(borders, points, s.linear) for s, points in zip(schedules, moved, strict=True)]
    return borders, np.stack(rows, axis=1)


def _over(
    borders: NDArray[np.int64], points: dict[int, float], linear: bool
) -> NDArray[np.float64]:
    """A weight [S] in the middle of stretches between `borders` [S + 1]; `points` by draw."""
    middle = (borders[:-1] + borders[1:]) / 2
    at, weight = np.array([*points], np.float64), np.array([*points.values()], np.float64)
    last = np.searchsorted(at, middle, side="right") - 1
    after = np.minimum(last + 1, len(at) - 1)
    if not linear:
        return weight[last]
    part = (middle - at[last]) / np.maximum(at[after] - at[last], 1)
    return np.where(
        after > last, weight[last] + (weight[after] - weight[last]) * part, weight[last]
    )
