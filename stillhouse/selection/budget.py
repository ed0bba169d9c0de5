"""The exact global cut, out of core: the k best rows of any number of parts of scores.

The order is: score descending, then (part, row) ascending; NaN is never kept, -0.0 equals 0.0.
A float32 maps to a uint32 that sorts alike. One pass counts the upper 16 bits, which leaves one
bucket with the last kept row; if its rows are few they are gathered and sorted, else a pass counts
their lower 16 bits and one more finds the row among the ties. So two to four passes, one part at a
time, and memory for one part, two histograms and at most `MAX_CANDIDATES` rows.

    >>> import numpy as np
    >>> scores = {"a": np.float32([3, 1]), "b": np.float32([2, 3])}
    >>> {part: mask.tolist() for part, mask in top_k(scores, k=2).items()}
    {'a': [True, False], 'b': [False, True]}
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stillhouse.errors import BudgetError

PartName: TypeAlias = Any  # an int or a string, all of one kind; compared with `<`
Scores: TypeAlias = NDArray[np.float32]
Weights: TypeAlias = NDArray[np.int64]
Load: TypeAlias = Callable[[], tuple[Scores, Weights | None]]
Run: TypeAlias = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]

MAX_CANDIDATES = 2**21


@dataclass(frozen=True, slots=True)
class Cut:
    """The last kept row. With `part` None every row of at least `score` is kept."""

    score: float
    part: PartName
    row: int

    def mask(self, part: PartName, scores: ArrayLike, sources: Any = None) -> NDArray[np.bool_]:
        """Which rows of `part` are kept: float32[n] -> bool[n]; `sources` are for a `QuotaCut`."""
        values = np.asarray(scores, dtype=np.float32)
        if self.part is None or part < self.part:
            return values >= self.score
        kept = values > self.score
        if part == self.part:
            kept[: self.row + 1] |= values[: self.row + 1] == self.score
        return kept

    def among(self, rows: Sequence[Sequence[int]]) -> "Cut":
        """The same cut where each part is several ones: `rows[part][i]` are the rows of its i-th.

        Those are numbered through all parts, which are numbered from 0.
        """
        if self.part is None:
            return self
        ends = np.cumsum(rows[self.part])
        place = int(np.searchsorted(ends, self.row, side="right"))
        before = int(ends[place - 1]) if place else 0
        return Cut(self.score, sum(map(len, rows[: self.part])) + place, self.row - before)


def threshold_cut(score: float) -> Cut:
    return Cut(score, None, 0)


def find_cut(parts: Mapping[PartName, Callable[[], Scores]], k: int, *, run: Run = map) -> Cut:
    """The cut that keeps exactly the `k` best of all rows.

    `parts` maps names to functions that load float32[n]. `run` works like the built-in `map`; it
    may spread the loading over processes, to which the functions are then pickled.

    Raises:
        BudgetError: `k` is not between 1 and the number of rows that are not NaN.
    """
    names = sorted(parts)
    search = _Search(names, [partial(_unweighted, parts[name]) for name in names], run)
    if not 1 <= k <= search.total:
        raise BudgetError(f"cannot keep {k:,} of {search.total:,} rows{_at_most(search.total)}")
    return search.cut(k)


def find_weighted_cut(
    parts: Mapping[PartName, Callable[[], tuple[Scores, Weights]]], budget: int, *, run: Run = map
) -> Cut:
    """The cut that keeps the longest prefix of the order whose weights sum to at most `budget`.

    Like `find_cut`, with functions that load (scores float32[n], weights int64[n], all >= 1), such
    as the tokens of documents. A part's weights may sum to 2**53.

    Raises:
        BudgetError: `budget` is not between 1 and the sum of all weights of rows that are not NaN,
            or the best row alone exceeds it.
    """
    names = sorted(parts)
    search = _Search(names, [parts[name] for name in names], run)
    if not 1 <= budget <= search.total:
        raise BudgetError(
            f"cannot keep {budget:,} tokens of {search.total:,} in documents"
            f"{_at_most(search.total)}"
        )
    return search.cut(budget)


def _at_most(total: int) -> str:
    if total == 0:
        return ": none is eligible"
    return (
        f" that are eligible: set `selection.tau`, `num_tokens` or `fraction` so that at least 1 "
        f"and at most {total:,} are kept"
    )


def top_k(scores_by_part: Mapping[PartName, ArrayLike], *, k: int) -> dict[PartName, Any]:
    """`find_cut` over arrays in memory: {part: scores[n]} -> {part: bool[n]}, `k` True in all."""
    arrays = {part: np.asarray(s, dtype=np.float32) for part, s in scores_by_part.items()}
    cut = find_cut({part: partial(np.asarray, s) for part, s in arrays.items()}, k)
    return {part: cut.mask(part, scores) for part, scores in arrays.items()}


@dataclass(frozen=True, slots=True)
class _Histogram:
    """Rows and weight by a 16-bit digit of the key; sparse: `digits` are unique, ascending."""

    digits: NDArray[np.int64]
    rows: NDArray[np.int64]
    weight: NDArray[np.int64]

    @classmethod
    def sum(cls, parts: Iterable["_Histogram"]) -> "_Histogram":
        rows, weight = np.zeros(2**16, np.int64), np.zeros(2**16, np.int64)
        for part in parts:
            rows[part.digits] += part.rows
            weight[part.digits] += part.weight
        digits = np.flatnonzero(rows)
        return cls(digits, rows[digits], weight[digits])

    def reach(self, budget: int) -> tuple[int, int, int]:
        """The highest digit at which the weight from the top reaches `budget`.

        Returns (digit, number of rows that have it, weight above it).
        """
        from_top = np.cumsum(self.weight[::-1])
        index = len(self.digits) - 1 - int(np.searchsorted(from_top, budget))
        above = int(self.weight[index + 1 :].sum())
        return int(self.digits[index]), int(self.rows[index]), above


class _Search:
    """A search over parts in ascending order of their names."""

    def __init__(self, names: Sequence[PartName], loads: Sequence[Load], run: Run) -> None:
        self._names, self._loads, self._run = names, loads, run
        self._upper = _Histogram.sum(run(_count, loads))
        self.total = int(self._upper.weight.sum())

    def cut(self, budget: int) -> Cut:
        """The last row of the longest prefix within `budget`, which is at most the total.

        If the weight reaches `budget` inside the first row of a bucket, the prefix ends in an
        earlier bucket: a second search for the weight above finds it.
        """
        found = self._locate(budget)
        if found == 0:
            raise BudgetError(
                f"the best document alone exceeds the budget of {budget:,} tokens: raise "
                "`num_tokens`"
            )
        return found if isinstance(found, Cut) else self.cut(found)

    def _locate(self, budget: int) -> Cut | int:
        """The cut, or the weight above the bucket if not even its first row fits."""
        upper, num_rows, above = self._upper.reach(budget)
        if num_rows <= MAX_CANDIDATES:
            return self._among_candidates(upper, budget, above)
        lower = _Histogram.sum(self._run(partial(_count, upper=upper), self._loads))
        digit, _, above_in_bucket = lower.reach(budget - above)
        return self._among_ties(_score(upper << 16 | digit), budget, above + above_in_bucket)

    def _among_candidates(self, upper: int, budget: int, above: int) -> Cut | int:
        gathered = list(self._run(partial(_gather, upper=upper), self._loads))
        position = np.repeat(np.arange(len(gathered)), [len(g[0]) for g in gathered])
        row, lower, weight = (np.concatenate(column) for column in zip(*gathered, strict=True))
        order = np.argsort(~lower, kind="stable")  # best first; ties stay in (part, row) order
        num_fit = np.searchsorted(np.cumsum(weight[order]), budget - above, side="right")
        if num_fit == 0:
            return above
        last = order[num_fit - 1]
        score = _score(upper << 16 | int(lower[last]))
        return Cut(score, self._names[int(position[last])], int(row[last]))

    def _among_ties(self, score: float, budget: int, above: int) -> Cut | int:
        weights = np.array(list(self._run(partial(_tied_weight, score=score), self._loads)))
        position = int(np.searchsorted(np.cumsum(weights), budget - above))
        above += int(weights[:position].sum())
        load = self._loads[position]
        row, weight = next(iter(self._run(partial(_tied_rows, score=score), [load])))
        num_fit = np.searchsorted(np.cumsum(weight), budget - above, side="right")
        if num_fit == 0:
            return above
        return Cut(score, self._names[position], int(row[num_fit - 1]))


def _unweighted(load: Callable[[], Scores]) -> tuple[Scores, None]:
    return np.asarray(load(), dtype=np.float32), None


def _weights_at(rows: NDArray[np.int64], weights: Weights | None) -> Weights:
    return np.ones(len(rows), np.int64) if weights is None else weights[rows]


def _keys(scores: Scores) -> NDArray[np.uint32]:
    """uint32 that sort like the scores; NaN gets 0, below -inf."""
    bits = (scores + np.float32(0)).view(np.int32)  # -0.0 + 0.0 is 0.0
    keys = (bits ^ ((bits >> 31) | np.int32(-(2**31)))).view(np.uint32)
    keys[np.isnan(scores)] = 0
    return keys


def _score(key: int) -> float:
    """The float32 that has this key."""
    bits = key ^ (0x80000000 if key >> 31 else 0xFFFFFFFF)
    return float(np.uint32(bits).view(np.float32))


def _count(load: Load, upper: int | None = None) -> _Histogram:
    """Rows and weight by the upper digit, or by the lower one of the rows with this upper digit."""
    scores, weights = load()
    keys = _keys(scores)
    inside = keys >> 16 == upper if upper is not None else keys > 0xFFFF  # a smaller key is NaN's
    digits = keys[inside] & 0xFFFF if upper is not None else keys[inside] >> 16
    rows = np.bincount(digits)
    weight = rows if weights is None else np.bincount(digits, weights[inside]).astype(np.int64)
    used = np.flatnonzero(rows)
    return _Histogram(used, rows[used], weight[used])


def _gather(load: Load, upper: int) -> tuple[Weights, NDArray[np.uint16], Weights]:
    """(rows, lower digits, weights) of the rows that have this upper digit."""
    scores, weights = load()
    keys = _keys(scores)
    rows = np.flatnonzero(keys >> 16 == upper)
    return rows, keys[rows].astype(np.uint16), _weights_at(rows, weights)


def _tied_rows(load: Load, score: float) -> tuple[Weights, Weights]:
    """(rows, weights) of the rows that have exactly this score."""
    scores, weights = load()
    rows = np.flatnonzero(scores == np.float32(score))
    return rows, _weights_at(rows, weights)


def _tied_weight(load: Load, score: float) -> int:
    return int(_tied_rows(load, score)[1].sum())
