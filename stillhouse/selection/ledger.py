"""The ledger (how many rows of each part were kept or dropped, and why) and the report's figures.

A `Tally` is made where a part's rows are written and added up over parts. It is plain numbers, so
that the report never reads the pool again.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from math import sqrt
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import TypeAdapter

from stillhouse.selection.ranking import CONTAMINATED, ELIGIBLE, REASONS, PartScores, Span

Floats = NDArray[np.float64]
Example = tuple[float, int, int]
"""Score, part and row."""
SCORE_SPAN: Span = (-8.0, 8.0)
LOSS_SPAN: Span = (0.0, 12.0)
"""Default ends of the histograms, in nats per token."""
NUM_EXAMPLES = 3
LEDGER_SCHEMA = pa.schema(
    [("part", pa.int32()), ("path", pa.string()), ("rows", pa.int64()), ("kept", pa.int64())]
    + [(reason.replace(" ", "_"), pa.int64()) for reason in REASONS]
    + [("kept_tokens", pa.int64())]
)


_SUMMED = ("pool_scores", "kept_scores", "pool_losses", "kept_losses", "seen", "unseen")


@dataclass(slots=True)
class Moments:
    """Count, mean, and sum of squared deviations from the mean, of finite values.

    They add up over parts without the cancellation of sums of squares (Chan, Golub, LeVeque, 1983).
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, values: Floats) -> "Moments":
        if not len(values):
            return cls()
        mean = float(values.mean())
        return cls(len(values), mean, float(((values - mean) ** 2).sum()))

    def add(self, other: "Moments") -> None:
        count = self.count + other.count
        if not other.count:
            return
        gap, share = other.mean - self.mean, other.count / count
        self.squares += other.squares + gap**2 * self.count * share
        self.mean += gap * share
        self.count = count

    @property
    def std(self) -> float:
        """The standard deviation (of the population); 0 without values."""
        return sqrt(self.squares / self.count) if self.count else 0.0


@dataclass(slots=True)
class PairMoments:
    """Moments of pairs (x, y), and the sum of the products of their deviations."""

    x: Moments = field(default_factory=Moments)
    y: Moments = field(default_factory=Moments)
    products: float = 0.0

    @classmethod
    def of(cls, x: Floats, y: Floats) -> "PairMoments":
        found = cls(Moments.of(x), Moments.of(y))
        found.products = float(((x - found.x.mean) * (y - found.y.mean)).sum())
        return found

    def add(self, other: "PairMoments") -> None:
        if other.x.count:
            share = other.x.count / (self.x.count + other.x.count)
            gaps = (other.x.mean - self.x.mean) * (other.y.mean - self.y.mean)
            self.products += other.products + gaps * self.x.count * share
        self.x.add(other.x)
        self.y.add(other.y)

    @property
    def correlation(self) -> float:
        """Pearson's coefficient; 0 where one side is constant."""
        spread = sqrt(self.x.squares) * sqrt(self.y.squares)
        return self.products / spread if spread > 0 else 0.0


def moments_by_code(codes: NDArray[np.int32], values: Floats, num_codes: int) -> list[Moments]:
    counts = np.bincount(codes, minlength=num_codes)
    means = np.bincount(codes, values, num_codes) / np.maximum(counts, 1)
    squares = np.bincount(codes, (values - means[codes]) ** 2, num_codes)
    return [
        Moments(int(n), float(m), float(s)) for n, m, s in zip(counts, means, squares, strict=True)
    ]


@dataclass(slots=True)
class SourceTally:
    """Counts of one source, and the scores of the rows of which it owns most tokens."""

    pool_tokens: int = 0
    kept_tokens: int = 0
    pool_rows: int = 0
    kept_rows: int = 0
    scores: Moments = field(default_factory=Moments)

    def add(self, other: "SourceTally") -> None:
        self.pool_tokens += other.pool_tokens
        self.kept_tokens += other.kept_tokens
        self.pool_rows += other.pool_rows
        self.kept_rows += other.kept_rows
        self.scores.add(other.scores)


@dataclass(slots=True)
class Tally:
    """Counts and sums over any number of parts."""

    sources: dict[str, SourceTally] = field(default_factory=dict)
    fates: Counter[str] = field(default_factory=Counter)
    fate_tokens: Counter[str] = field(default_factory=Counter)
    span: Span = SCORE_SPAN
    """Ends of the score histograms."""
    loss_span: Span = LOSS_SPAN
    """Ends of the histogram of losses, in both directions."""
    pool_scores: list[int] = field(default_factory=list)
    kept_scores: list[int] = field(default_factory=list)
    pool_losses: list[list[int]] = field(default_factory=list)
    kept_losses: list[list[int]] = field(default_factory=list)
    seen: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """Rows the prior was trained on, and the sum of their scores."""
    unseen: list[float] = field(default_factory=lambda: [0.0, 0.0])
    pieces: PairMoments = field(default_factory=PairMoments)
    """x the number of pieces of a row, y its score, where that is finite."""
    ties: int = 0
    benchmarks: Counter[str] = field(default_factory=Counter)
    """Rows that share text with benchmarks, by the number of the file."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """The ledger: one row a part."""
    examples: dict[str, list[Example]] = field(default_factory=dict)
    """By group: best, above, below, worst."""

    def to_json(self) -> dict[str, Any]:
        return _tally_type().dump_python(self, mode="json")

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Tally":
        return _tally_type().validate_python(content)

    def add(self, other: "Tally") -> None:
        for name, theirs in other.sources.items():
            self.sources.setdefault(name, SourceTally()).add(theirs)
        self.fates.update(other.fates)
        self.fate_tokens.update(other.fate_tokens)
        for name in _SUMMED:
            mine, theirs = getattr(self, name), getattr(other, name)
            both = (np.array(mine) + np.array(theirs)).tolist() if mine and theirs else []
            setattr(self, name, both or mine or theirs)
        self.pieces.add(other.pieces)
        self.ties += other.ties
        self.benchmarks.update(other.benchmarks)
        self.span, self.loss_span = other.span, other.loss_span
        self.rows += other.rows
        for group, found in other.examples.items():
            self.examples[group] = nearest(group, self.examples.get(group, []) + found)


@cache
def _tally_type() -> TypeAdapter[Tally]:
    return TypeAdapter(Tally)


def score_edges(span: Span) -> NDArray[np.float64]:
    return np.linspace(*span, 321)


def loss_edges(span: Span) -> NDArray[np.float64]:
    return np.linspace(*span, 49)


def join_spans(spans: Iterable[Span | None], default: Span) -> Span:
    """The union of the parts' spans; `default` without any, a width of 1 around a single value."""
    found = [span for span in spans if span is not None]
    if not found:
        return default
    low, high = min(low for low, _ in found), max(high for _, high in found)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def nearest(group: str, found: list[Example], count: int = NUM_EXAMPLES) -> list[Example]:
    """The examples that represent a group: the highest of `best` and `below`, else the lowest."""
    highest = group in {"best", "below"}
    return sorted(found, key=lambda e: (-e[0] if highest else e[0], e[1], e[2]))[:count]


@dataclass(frozen=True, slots=True)
class OwnedTokens:
    """The sources of the tokens of n rows in p pieces of documents; sources index `labels`.

    Attributes:
        row_source: int [n], the source that owns most of a row.
        piece_row: int [p], the row that each piece lies in.
        piece_source: int [p].
        piece_tokens: int [p].
    """

    row_source: NDArray[np.int32]
    piece_row: NDArray[np.int64]
    piece_source: NDArray[np.int32]
    piece_tokens: NDArray[np.int64]
    labels: list[str]


def _sources(
    owned: OwnedTokens,
    raw: NDArray[np.float32],
    kept: NDArray[np.bool_],
    usable: NDArray[np.bool_],
) -> dict[str, SourceTally]:
    count = len(owned.labels)
    pool_tokens = np.bincount(owned.piece_source, owned.piece_tokens, count)
    kept_pieces = kept[owned.piece_row]
    kept_tokens = np.bincount(
        owned.piece_source[kept_pieces], owned.piece_tokens[kept_pieces], count
    )
    pool_rows = np.bincount(owned.row_source, minlength=count)
    kept_rows = np.bincount(owned.row_source[kept], minlength=count)
    scores = moments_by_code(owned.row_source[usable], raw[usable].astype(np.float64), count)
    return {
        owned.labels[code]: SourceTally(
            int(pool_tokens[code]),
            int(kept_tokens[code]),
            int(pool_rows[code]),
            int(kept_rows[code]),
            scores[code],
        )
        for code in np.flatnonzero(pool_tokens).tolist()
    }


def tally_part(
    part: int,
    path: str,
    scores: PartScores,
    kept: NDArray[np.bool_],
    threshold: float,
    *,
    owned: OwnedTokens,
    span: Span = SCORE_SPAN,
    loss_span: Span = LOSS_SPAN,
) -> Tally:
    """The tally of one part of n rows.

    Args:
        part, path: the part's index and path.
        kept: bool [n].
        threshold: the score of the worst kept row.
        span, loss_span: ends of the histograms; values outside count in the outermost bins.
    """
    tally = Tally(span=span, loss_span=loss_span)
    fate = np.where(kept, -1, scores.fate)
    names = ["kept", *REASONS]
    for code, name in enumerate(names, start=-1):
        mine = fate == code
        tally.fates[name] = int(mine.sum())
        tally.fate_tokens[name] = int(scores.weight[mine].sum())
    ledger = {reason.replace(" ", "_"): tally.fates[reason] for reason in REASONS}
    tally.rows = [
        {"part": part, "path": path, "rows": len(kept), "kept": tally.fates["kept"]}
        | ledger
        | {"kept_tokens": tally.fate_tokens["kept"]}
    ]
    usable = np.isfinite(scores.raw)
    tally.sources = _sources(owned, scores.raw, kept, usable)
    _distributions(tally, scores, kept, usable)
    row_pieces = np.bincount(owned.piece_row, minlength=len(kept)).astype(np.float64)
    tally.pieces = PairMoments.of(row_pieces[usable], scores.raw[usable].astype(np.float64))
    tally.ties = int((scores.value == np.float32(threshold)).sum())
    shared, counts = np.unique(scores.benchmark[scores.benchmark > 0], return_counts=True)
    tally.benchmarks = Counter(dict(zip(map(str, shared.tolist()), counts.tolist(), strict=True)))
    tally.examples = _examples(part, scores, kept)
    return tally


def _distributions(
    tally: Tally, scores: PartScores, kept: NDArray[np.bool_], usable: NDArray[np.bool_]
) -> None:
    edges = score_edges(tally.span)
    raw = np.clip(scores.raw, *tally.span)
    tally.pool_scores = np.histogram(raw[usable], edges)[0].tolist()
    tally.kept_scores = np.histogram(raw[kept], edges)[0].tolist()
    if {"prior", "conditional"} <= set(scores.losses):
        x, y = (np.clip(scores.losses[n], *tally.loss_span) for n in ("prior", "conditional"))
        both = usable & ~np.isnan(x) & ~np.isnan(y)
        edges = [loss_edges(tally.loss_span)] * 2
        tally.pool_losses = np.histogram2d(x[both], y[both], edges)[0].astype(int).tolist()
        tally.kept_losses = np.histogram2d(x[kept], y[kept], edges)[0].astype(int).tolist()
    clean = usable & (scores.fate != CONTAMINATED)
    seen, unseen = clean & scores.seen, clean & ~scores.seen
    tally.seen = [float(seen.sum()), float(scores.raw[seen].sum(dtype=np.float64))]
    tally.unseen = [float(unseen.sum()), float(scores.raw[unseen].sum(dtype=np.float64))]


def _examples(part: int, scores: PartScores, kept: NDArray[np.bool_]) -> dict[str, list[Example]]:
    found: dict[str, list[Example]] = {}
    kept = kept & np.isfinite(scores.raw)
    below = (scores.fate == ELIGIBLE) & ~kept & np.isfinite(scores.raw)
    for group, mask in (("best", kept), ("above", kept), ("below", below), ("worst", below)):
        rows = np.flatnonzero(mask)
        order = np.argsort(scores.raw[rows], kind="stable")
        ends = order[-NUM_EXAMPLES:] if group in {"best", "below"} else order[:NUM_EXAMPLES]
        found[group] = nearest(group, [(float(scores.raw[r]), part, int(r)) for r in rows[ends]])
    return found
