"""The pool's sources, and the exact cut under quotas: the k best rows with each source's share.

Of k rows, source s gets at least ceil(min_share[s] * k) and at most floor(max_share[s] * k). The
best such selection takes each source's top minimum and fills up, in the global order, with rows
that are within their source's maximum. (Exchange argument: within a source the best rows come
first, so only the counts are free, and a fill row can only be swapped for a worse one.) It is
found by `budget.find_cut` over scores with NaN for the rows that are not candidates; the cost is
one such search for each minimum, one for each maximum that binds, and one for the rest.

A source column may hold a label for every document (URLs): only the `MAX_SOURCES` largest and those
that a quota names are counted one by one, so that neither memory nor a report grows with them.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from stillhouse.errors import BudgetError
from stillhouse.selection.budget import Cut, PartName, Run, Scores, find_cut

Codes: TypeAlias = NDArray[np.int32]
Load: TypeAlias = Callable[[], tuple[Scores, Codes]]
MAX_SOURCES = 1000
OTHER = "(other)"
"""All sources that are not counted one by one, including one that is really called that."""
_MOST_LABELS = 100_000
"""Labels whose counts are held at once; beyond that the smallest are evicted."""
_MOST_LISTED = 20
_NOTHING = Cut(math.nan, None, 0)  # no score is at least NaN


@dataclass(frozen=True, slots=True)
class Sources:
    """The sources of a pool that are counted one by one, sorted by name.

    Attributes:
        others: whether the pool has more of them.
        num_rows: of each named source; a lower bound where its count was evicted in between.
        largest_other: upper bound of the rows of any other source.
    """

    names: tuple[str, ...]
    others: bool = False
    num_rows: tuple[int, ...] = ()
    largest_other: int = 0

    @classmethod
    def from_labels(cls, labels: Sequence[str]) -> "Sources":
        others = bool(labels) and labels[-1] == OTHER
        return cls(tuple(labels[:-1] if others else labels), others)

    def identity(self) -> list[str]:
        return self.labels

    @property
    def labels(self) -> list[str]:
        """The names of the codes 0, 1, ..."""
        return [*self.names, OTHER] if self.others else list(self.names)

    def codes(self, labels: Sequence[str]) -> NDArray[np.int32]:
        """int32 [n]: the code of each label; all others share the last code."""
        place = {name: code for code, name in enumerate(self.names)}
        return np.array([place.get(label, len(self.names)) for label in labels], np.int32)


@dataclass(slots=True)
class LabelCounts:
    """Tokens and rows of the `named` labels and of at most `_MOST_LABELS` others, the largest.

    An evicted label had at most `forgotten_rows` rows until then.
    """

    named: frozenset[str] = frozenset()
    counts: dict[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    forgotten_rows: int = 0

    def add(self, found: Iterable[tuple[str, int, int]], forgotten_rows: int = 0) -> None:
        """Add (label, tokens, rows), each label once."""
        self.forgotten_rows += forgotten_rows
        for label, tokens, rows in found:
            before = self.counts.get(label, (0, 0))
            self.counts[label] = before[0] + tokens, before[1] + rows
            if len(self.counts) > 2 * _MOST_LABELS + len(self.named):
                self._forget()

    def _forget(self) -> None:
        small = [label for label in self._largest_first()[_MOST_LABELS:] if label not in self.named]
        self.forgotten_rows += max((self.counts.pop(label)[1] for label in small), default=0)

    def _largest_first(self) -> list[str]:
        return sorted(self.counts, key=lambda label: (-self.counts[label][0], label))

    def choose(self) -> Sources:
        """The named ones that occur and the largest, up to `MAX_SOURCES`; ties by label."""
        known = [label for label in self._largest_first() if label != OTHER]
        named = [label for label in known if label in self.named]
        rest = [label for label in known if label not in self.named]
        room = max(0, MAX_SOURCES - len(named))
        chosen = {*named, *rest[:room]}
        left = [rows for label, (_, rows) in self.counts.items() if label not in chosen]
        others = bool(left) or self.forgotten_rows > 0
        largest = max(left, default=0) + self.forgotten_rows
        names = tuple(sorted(chosen))
        return Sources(names, others, tuple(self.counts[name][1] for name in names), largest)


@dataclass(frozen=True, slots=True)
class QuotaCut:
    """Cuts by source code, for the minima and for the maxima that bind, and that of the rest."""

    minima: Mapping[int, Cut]
    maxima: Mapping[int, Cut]
    rest: Cut | None  # None where the minima make up all of k

    @property
    def score(self) -> float:
        """The score of the worst kept row that no minimum brought in."""
        return self.rest.score if self.rest else min(cut.score for cut in self.minima.values())

    def mask(self, part: PartName, scores: Scores, sources: Codes) -> NDArray[np.bool_]:
        """Which rows of `part` are kept: float32[n], int32[n] -> bool[n]."""
        kept = _by_source(self.minima, part, scores, sources, default=False)
        if self.rest:
            kept |= self.rest.mask(part, self.free_scores(part, scores, sources))
        return kept

    def among(self, rows: Sequence[Sequence[int]]) -> "QuotaCut":
        """As `Cut.among`."""
        minima, maxima = (
            {source: cut.among(rows) for source, cut in cuts.items()}
            for cuts in (self.minima, self.maxima)
        )
        return QuotaCut(minima, maxima, self.rest and self.rest.among(rows))

    def free_scores(self, part: PartName, scores: Scores, sources: Codes) -> Scores:
        """Scores of the rows within their source's maximum that no minimum takes, else NaN."""
        taken = _by_source(self.minima, part, scores, sources, default=False)
        allowed = _by_source(self.maxima, part, scores, sources, default=True)
        return np.where(allowed & ~taken, scores, np.float32(np.nan))


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
    is an index into `names`. Shares are of `k`. `run` as for `find_cut`.

    Raises:
        BudgetError: as `check_shares`.
    """
    counts = run(partial(_count_sources, num_sources=len(names)), parts.values())
    num_rows = sum(counts, np.zeros(len(names), np.int64)).tolist()
    minima, maxima = check_shares(k, num_rows, names, max_share=max_share, min_share=min_share)

    def cut_of(source: int, count: int) -> Cut:
        loads = {part: partial(_source_scores, load, source) for part, load in parts.items()}
        return find_cut(loads, count, run=run)

    lower = {s: cut_of(s, count) for s, count in sorted(minima.items()) if count > 0}
    binding = {s: count for s, count in sorted(maxima.items()) if count < num_rows[s]}
    upper = {s: cut_of(s, count) if count > 0 else _NOTHING for s, count in binding.items()}
    quotas, rest = QuotaCut(lower, upper, None), k - sum(minima.values())
    loads = {part: partial(_load_free, load, part, quotas) for part, load in parts.items()}
    return replace(quotas, rest=find_cut(loads, rest, run=run) if rest else None)


def check_shares(
    k: int,
    num_rows: Sequence[int],
    names: Sequence[str],
    *,
    max_share: Mapping[int, float] | None = None,
    min_share: Mapping[int, float] | None = None,
) -> tuple[dict[int, int], dict[int, int]]:
    """The minimum and maximum number of rows by source; `num_rows` may include ineligible rows.

    Raises:
        BudgetError: the quotas cannot all hold.
    """
    minima = {s: math.ceil(_exact(share) * k) for s, share in (min_share or {}).items()}
    maxima = {s: math.floor(_exact(share) * k) for s, share in (max_share or {}).items()}
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
        listed = _listed([f"{names[s]!r} {count:,}" for s, count in minima.items()])
        raise BudgetError(f"`min_share` asks for more than {k:,} rows in all: {listed}")
    capped = {s: min(count, maxima.get(s, count)) for s, count in enumerate(num_rows)}
    if not 1 <= k <= sum(capped.values()):
        listed = _listed([f"{names[s]!r} {count:,}" for s, count in capped.items()])
        raise BudgetError(
            f"cannot keep {k:,} rows, `max_share` and the pool allow {sum(capped.values()):,}: "
            f"{listed}; raise `max_share` or keep less"
        )
    return minima, maxima


def named_shares(
    max_share: float | Mapping[str, float] | None,
    min_share: Mapping[str, float] | None,
    sources: Sources,
) -> dict[str, Any]:
    """The shares of a spec by source code, as `find_quota_cut` takes them.

    A single `max_share` bounds each named source; `check_others` checks the rest.

    Raises:
        BudgetError: a source that the pool does not have.
    """
    index = {name: code for code, name in enumerate(sources.names)}

    def indexed(shares: Mapping[str, float]) -> dict[int, float]:
        for name in shares:
            if name not in index:
                raise BudgetError(f"no source {name!r} in the pool; it has {_listed(list(index))}")
        return {index[name]: share for name, share in shares.items()}

    if max_share is not None and not isinstance(max_share, Mapping):
        max_share = dict.fromkeys(sources.names, max_share)
    return {"max_share": indexed(max_share or {}), "min_share": indexed(min_share or {})}


def check_others(max_share: float | Mapping[str, float] | None, k: int, sources: Sources) -> None:
    """Check a single `max_share` for the sources that are not counted one by one.

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


def _listed(items: Sequence[str]) -> str:
    more = len(items) - _MOST_LISTED
    return ", ".join(items[:_MOST_LISTED]) + (f" and {more:,} more" if more > 0 else "")


def _exact(share: float) -> Fraction:
    """The share as written: 0.29 of 100 is 29, although the double is a little less."""
    return Fraction(repr(float(share)))


def _by_source(
    cuts: Mapping[int, Cut], part: PartName, scores: Scores, sources: Codes, *, default: bool
) -> NDArray[np.bool_]:
    """Each source's cut applied to its rows; `default` where it has none."""
    kept = np.full(len(scores), default)
    for source, cut in cuts.items():
        rows = sources == source
        kept[rows] = cut.mask(part, scores)[rows]
    return kept


def _load_free(load: Load, part: PartName, quotas: QuotaCut) -> Scores:
    return quotas.free_scores(part, *load())


def _source_scores(load: Load, source: int) -> Scores:
    scores, sources = load()
    return np.where(sources == source, scores, np.float32(np.nan))


def _count_sources(load: Load, num_sources: int) -> NDArray[np.int64]:
    scores, sources = load()
    return np.bincount(sources[~np.isnan(scores)], minlength=num_sources)


def cut_to_json(cut: Cut | QuotaCut) -> dict[str, Any]:
    if isinstance(cut, Cut):
        return asdict(cut)
    return {
        "minima": {str(source): asdict(c) for source, c in cut.minima.items()},
        "maxima": {
            str(source): None if math.isnan(c.score) else asdict(c)  # JSON has no NaN
            for source, c in cut.maxima.items()
        },
        "rest": asdict(cut.rest) if cut.rest else None,
    }


def cut_from_json(content: Mapping[str, Any]) -> Cut | QuotaCut:
    if "minima" not in content:
        return Cut(**content)
    return QuotaCut(
        {int(source): Cut(**c) for source, c in content["minima"].items()},
        {int(source): Cut(**c) if c else _NOTHING for source, c in content["maxima"].items()},
        Cut(**content["rest"]) if content["rest"] else None,
    )
