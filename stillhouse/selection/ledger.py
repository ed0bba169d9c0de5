"""What became of the rows: counts by reason for every input part, and the figures of the report.

A `Tally` is gathered where a part's rows are written, added up over parts, and is plain numbers
throughout, so that the report never reads the pool again.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stillhouse.selection.moments import Moments, PairMoments, moments_by_code
from stillhouse.selection.ranking import CONTAMINATED, ELIGIBLE, REASONS, PartScores, Span

SCORE_SPAN: Span = (-8.0, 8.0)
LOSS_SPAN: Span = (0.0, 12.0)
"""Ends of histograms in nats per token where no value says better."""
NUM_EXAMPLES = 3
LEDGER_SCHEMA = pa.schema(
    [("part", pa.int32()), ("path", pa.string()), ("rows", pa.int64()), ("kept", pa.int64())]
    + [(reason.replace(" ", "_"), pa.int64()) for reason in REASONS]
    + [("kept_tokens", pa.int64())]
)


@dataclass(slots=True)
class SourceTally:
    """One source's share; scores are those of rows of which it owns most tokens."""

    pool_tokens: int = 0
    kept_tokens: int = 0
    pool_rows: int = 0
    kept_rows: int = 0
    scores: Moments = field(default_factory=Moments)

    def add(self, other: "SourceTally") -> None:
        """Add another part's share."""
        self.pool_tokens += other.pool_tokens
        self.kept_tokens += other.kept_tokens
        self.pool_rows += other.pool_rows
        self.kept_rows += other.kept_rows
        self.scores.add(other.scores)


@dataclass(slots=True)
class Tally:
    """Sums over any number of parts."""

    sources: dict[str, SourceTally] = field(default_factory=dict)
    fates: Counter[str] = field(default_factory=Counter)
    fate_tokens: Counter[str] = field(default_factory=Counter)
    span: Span = SCORE_SPAN
    """Ends of the score histograms."""
    loss_span: Span = LOSS_SPAN
    """Ends of the histograms of losses, both of them."""
    pool_scores: list[int] = field(default_factory=list)
    kept_scores: list[int] = field(default_factory=list)
    pool_losses: list[list[int]] = field(default_factory=list)
    kept_losses: list[list[int]] = field(default_factory=list)
    seen: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """Rows the prior was trained on, and the sum of their scores."""
    unseen: list[float] = field(default_factory=lambda: [0.0, 0.0])
    pieces: PairMoments = field(default_factory=PairMoments)
    """Of all finite scores: x the number of pieces of a row, y its score."""
    ties: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    """The ledger: one row a part."""
    examples: dict[str, list[tuple[float, int, int]]] = field(default_factory=dict)
    """By group (best, above, below, worst): score, part, row."""

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        content = {f.name: getattr(self, f.name) for f in fields(self)}
        content["sources"] = {name: asdict(source) for name, source in self.sources.items()}
        content["pieces"] = asdict(self.pieces)
        return content | {"fates": dict(self.fates), "fate_tokens": dict(self.fate_tokens)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Tally":
        """The inverse of `to_json`."""
        made = cls(**content)
        made.sources = {
            name: SourceTally(**s | {"scores": Moments(**s["scores"])})
            for name, s in content["sources"].items()
        }
        pairs = content["pieces"]
        made.pieces = PairMoments(Moments(**pairs["x"]), Moments(**pairs["y"]), pairs["products"])
        made.fates, made.fate_tokens = Counter(content["fates"]), Counter(content["fate_tokens"])
        made.span = (made.span[0], made.span[1])
        made.loss_span = (made.loss_span[0], made.loss_span[1])
        made.examples = {g: [tuple(e) for e in found] for g, found in content["examples"].items()}  # type: ignore[misc]
        return made

    def add(self, other: "Tally") -> None:
        """Add another part's sums to these."""
        for name, theirs in other.sources.items():
            self.sources.setdefault(name, SourceTally()).add(theirs)
        self.fates.update(other.fates)
        self.fate_tokens.update(other.fate_tokens)
        for name in ("pool_scores", "kept_scores", "pool_losses", "kept_losses"):
            setattr(self, name, _sum(getattr(self, name), getattr(other, name)))
        for name in ("seen", "unseen"):
            setattr(self, name, _sum(getattr(self, name), getattr(other, name)))
        self.pieces.add(other.pieces)
        self.ties += other.ties
        self.span, self.loss_span = other.span, other.loss_span
        self.rows += other.rows
        for group, found in other.examples.items():
            self.examples[group] = nearest(group, self.examples.get(group, []) + found)


def score_edges(span: Span) -> NDArray[np.float64]:
    """The edges of the 320 bins of a score histogram."""
    return np.linspace(*span, 321)


def loss_edges(span: Span) -> NDArray[np.float64]:
    """The edges of the 48 bins of a histogram of losses, each way."""
    return np.linspace(*span, 49)


def join_spans(spans: Iterable[Span | None], default: Span) -> Span:
    """The span of all parts; `default` where there is none, a width of 1 around a single value."""
    found = [span for span in spans if span is not None]
    if not found:
        return default
    low, high = min(low for low, _ in found), max(high for _, high in found)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def nearest(
    group: str, found: list[tuple[float, int, int]], count: int = NUM_EXAMPLES
) -> list[tuple[float, int, int]]:
    """The examples that a group wants: the highest of `best` and `below`, else the lowest."""
    highest = group in {"best", "below"}
    return sorted(found, key=lambda e: (-e[0] if highest else e[0], e[1], e[2]))[:count]


def _sum(mine: list[Any], theirs: list[Any]) -> list[Any]:
    if not mine or not theirs:
        return mine or theirs
    return (np.array(mine) + np.array(theirs)).tolist()


@dataclass(frozen=True, slots=True)
class OwnedTokens:
    """Whose the tokens of n rows are; sources are codes, those of `labels`.

    Attributes:
        row_source: int [n], the source that owns most of a row.
        piece_row: int [p], the row that each piece of a document lies in.
        piece_source: int [p], its source.
        piece_tokens: int [p], its tokens.
        labels: of the codes.
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
    """The share of each source that has a token: arrays over pieces or sources, never both."""
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
        scores: its joined scores.
        kept: bool [n].
        threshold: the score of the worst kept row.
        owned: whose the rows' tokens are.
        span, loss_span: ends of the histograms; what lies outside counts in the last bins.
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


def _examples(
    part: int, scores: PartScores, kept: NDArray[np.bool_]
) -> dict[str, list[tuple[float, int, int]]]:
    found: dict[str, list[tuple[float, int, int]]] = {}
    kept = kept & np.isfinite(scores.raw)
    below = (scores.fate == ELIGIBLE) & ~kept & np.isfinite(scores.raw)
    for group, mask in (("best", kept), ("above", kept), ("below", below), ("worst", below)):
        rows = np.flatnonzero(mask)
        order = np.argsort(scores.raw[rows], kind="stable")
        ends = order[-NUM_EXAMPLES:] if group in {"best", "below"} else order[:NUM_EXAMPLES]
        found[group] = nearest(group, [(float(scores.raw[r]), part, int(r)) for r in rows[ends]])
    return found
