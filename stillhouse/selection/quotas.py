"""The exact cut under quotas: the k best rows such that each source keeps its share.

Of k rows, source s gets at least ceil(min_share[s] * k) and at most floor(max_share[s] * k). The
best such selection takes each source's top minimum and fills up, in the global order, with rows
that are within their source's maximum. (Exchange argument: within a source the best rows come
first, so only the counts are free, and a fill row can only be swapped for a worse one.) Everything
is found by `budget.find_cut` over scores in which rows that are out of the question are NaN; it
costs one such search for each minimum, one for each maximum that binds, and one for the rest.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from stillhouse.errors import BudgetError
from stillhouse.selection.budget import Cut, PartName, Run, Scores, find_cut
from stillhouse.selection.sources import Sources as PoolSources

Sources: TypeAlias = NDArray[np.int32]
Load: TypeAlias = Callable[[], tuple[Scores, Sources]]


@dataclass(frozen=True, slots=True)
class QuotaCut:
    """Cuts by source index, of the minima and of the maxima that bind, and the one of the rest."""

    minima: Mapping[int, Cut]
    maxima: Mapping[int, Cut]
    rest: Cut | None  # None where the minima make up all of k

    @property
    def score(self) -> float:
        """The score of the worst kept row that no minimum brought in; for people."""
        return self.rest.score if self.rest else min(cut.score for cut in self.minima.values())

    def mask(self, part: PartName, scores: Scores, sources: Sources) -> NDArray[np.bool_]:
        """Which rows of `part` are kept: float32[n], int32[n] -> bool[n]."""
        kept = _by_source(self.minima, part, scores, sources, default=False)
        if self.rest:
            free = _free_scores(scores, sources, part, self.minima, self.maxima)
            kept |= self.rest.mask(part, free)
        return kept


def find_quota_cut(
    parts: Mapping[PartName, Load],
    k: int,
    *,
    names: Sequence[str],
    max_share: Mapping[int, float] | None = None,
    min_share: Mapping[int, float] | None = None,
    run: Run = map,
) -> QuotaCut:
    """The best `k` rows in which each source's share is between its bounds.

    `parts` maps names to functions that load (scores float32[n], sources int32[n]), where a source
    is an index into `names`. Shares are of `k`.
    `run` as for `find_cut`.

    Raises:
        BudgetError: the quotas cannot all hold; it names the sources and the numbers.
    """
    num_rows = _rows_by_source(parts, len(names), run)
    minima, maxima = check_shares(k, num_rows, names, max_share=max_share, min_share=min_share)

    def cut_of(source: int, count: int) -> Cut:
        loads = {part: partial(_source_scores, load, source) for part, load in parts.items()}
        return find_cut(loads, count, run=run)

    lower = {s: cut_of(s, count) for s, count in sorted(minima.items()) if count > 0}
    binding = {s: count for s, count in sorted(maxima.items()) if count < num_rows[s]}
    upper = {s: cut_of(s, count) if count > 0 else _NOTHING for s, count in binding.items()}
    rest = k - sum(minima.values())
    loads = {part: partial(_load_free, load, part, lower, upper) for part, load in parts.items()}
    return QuotaCut(lower, upper, find_cut(loads, rest, run=run) if rest else None)


def check_shares(
    k: int,
    num_rows: Sequence[int],
    names: Sequence[str],
    *,
    max_share: Mapping[int, float] | None = None,
    min_share: Mapping[int, float] | None = None,
) -> tuple[dict[int, int], dict[int, int]]:
    """The least and the most rows by source; `num_rows` may count rows that are not eligible.

    Raises:
        BudgetError: the quotas cannot all hold; it names the sources and the numbers.
    """
    minima = {s: math.ceil(_exact(share) * k) for s, share in (min_share or {}).items()}
    maxima = {s: math.floor(_exact(share) * k) for s, share in (max_share or {}).items()}
    _check(k, minima, maxima, num_rows, names)
    return minima, maxima


_MOST_LISTED = 20
_NOTHING = Cut(math.nan, None, 0)  # no score is at least NaN


def named_shares(
    max_share: float | Mapping[str, float] | None,
    min_share: Mapping[str, float] | None,
    sources: PoolSources,
) -> dict[str, Any]:
    """The shares of a spec by source code, as `find_quota_cut` takes them.

    One `max_share` holds for every source; that it holds for those that are not counted one by one
    is for `check_others`.

    Raises:
        BudgetError: a source that the pool does not have.
    """
    index = {name: code for code, name in enumerate(sources.names)}

    def indexed(shares: Mapping[str, float]) -> dict[int, float]:
        for name in shares:
            if name not in index:
                raise BudgetError(
                    f"no source {name!r} in the pool; it has {_listed(list(index), ', ')}"
                )
        return {index[name]: share for name, share in shares.items()}

    if max_share is not None and not isinstance(max_share, Mapping):
        max_share = dict.fromkeys(sources.names, max_share)
    return {"max_share": indexed(max_share or {}), "min_share": indexed(min_share or {})}


def check_others(
    max_share: float | Mapping[str, float] | None, k: int, sources: PoolSources
) -> None:
    """One `max_share` for all sources must hold for those that are counted together as well.

    Raises:
        BudgetError: one of them may have more rows than it allows.
    """
    if max_share is None or isinstance(max_share, Mapping) or not sources.others:
        return
    maximum = math.floor(_exact(max_share) * k)
    if sources.largest_other > maximum:
        raise BudgetError(
            f"`max_share` {max_share:g} allows {maximum:,} of {k:,} rows for each source, but only "
            f"the {len(sources.names):,} largest are bounded one by one, and another one has up to "
            f"{sources.largest_other:,} rows: raise `max_share`, or give coarser labels "
            "(`pool.columns.source`)"
        )


def _listed(items: Sequence[str], joint: str) -> str:
    """The first of many."""
    more = len(items) - _MOST_LISTED
    return joint.join(items[:_MOST_LISTED]) + (f" and {more:,} more" if more > 0 else "")


def _exact(share: float) -> Fraction:
    """The share as it is written: 0.29 of 100 is 29, though the double is a little less."""
    return Fraction(repr(float(share)))


def _check(
    k: int,
    minima: Mapping[int, int],
    maxima: Mapping[int, int],
    num_rows: Sequence[int],
    names: Sequence[str],
) -> None:
    for source, minimum in minima.items():
        name, available = names[source], num_rows[source]
        if minimum > available:
            raise BudgetError(
                f"`min_share` of source {name!r} asks for {minimum:,} rows, it has {available:,}"
            )
        if minimum > maxima.get(source, minimum):
            raise BudgetError(
                f"`min_share` of source {name!r} asks for at least {minimum:,} of {k:,} rows, its "
                f"`max_share` for at most {maxima[source]:,}"
            )
    if sum(minima.values()) > k:
        listed = _listed([f"{names[s]!r} {count:,}" for s, count in minima.items()], ", ")
        raise BudgetError(f"`min_share` asks for more than {k:,} rows in all: {listed}")
    capped = {s: min(count, maxima.get(s, count)) for s, count in enumerate(num_rows)}
    if not 1 <= k <= sum(capped.values()):
        listed = _listed([f"{names[s]!r} {count:,}" for s, count in capped.items()], ", ")
        raise BudgetError(
            f"cannot keep {k:,} rows, `max_share` and the pool allow {sum(capped.values()):,}: "
            f"{listed}; raise `max_share` or keep less"
        )


def _by_source(
    cuts: Mapping[int, Cut], part: PartName, scores: Scores, sources: Sources, *, default: bool
) -> NDArray[np.bool_]:
    """Each source's own cut applied to its rows, `default` where it has none."""
    kept = np.full(len(scores), default)
    for source, cut in cuts.items():
        rows = sources == source
        kept[rows] = cut.mask(part, scores)[rows]
    return kept


def _free_scores(
    scores: Scores,
    sources: Sources,
    part: PartName,
    minima: Mapping[int, Cut],
    maxima: Mapping[int, Cut],
) -> Scores:
    """Scores of the rows within their maximum that no minimum takes, NaN for the others."""
    taken = _by_source(minima, part, scores, sources, default=False)
    allowed = _by_source(maxima, part, scores, sources, default=True)
    return np.where(allowed & ~taken, scores, np.float32(np.nan))


def _load_free(
    load: Load, part: PartName, minima: Mapping[int, Cut], maxima: Mapping[int, Cut]
) -> Scores:
    return _free_scores(*load(), part, minima, maxima)


def _source_scores(load: Load, source: int) -> Scores:
    scores, sources = load()
    return np.where(sources == source, scores, np.float32(np.nan))


def _count_sources(load: Load, num_sources: int) -> NDArray[np.int64]:
    scores, sources = load()
    return np.bincount(sources[~np.isnan(scores)], minlength=num_sources)


def _rows_by_source(parts: Mapping[PartName, Load], num_sources: int, run: Run) -> list[int]:
    counts = run(partial(_count_sources, num_sources=num_sources), parts.values())
    return [int(count) for count in sum(counts, np.zeros(num_sources, dtype=np.int64))]


def cut_to_json(cut: Cut | QuotaCut) -> dict[str, Any]:
    """A cut as a JSON object, for the manifest."""
    if isinstance(cut, Cut):
        return asdict(cut)
    return {
        "minima": {str(source): asdict(c) for source, c in cut.minima.items()},
        "maxima": {str(source): _nan_free(c) for source, c in cut.maxima.items()},
        "rest": asdict(cut.rest) if cut.rest else None,
    }


def cut_from_json(content: Mapping[str, Any]) -> Cut | QuotaCut:
    """The inverse of `cut_to_json`."""
    if "minima" not in content:
        return Cut(**content)
    return QuotaCut(
        {int(source): Cut(**c) for source, c in content["minima"].items()},
        {int(source): Cut(**c) if c else _NOTHING for source, c in content["maxima"].items()},
        Cut(**content["rest"]) if content["rest"] else None,
    )


def _nan_free(cut: Cut) -> dict[str, Any] | None:
    """JSON has no NaN: the cut that keeps nothing is null."""
    return None if math.isnan(cut.score) else asdict(cut)
