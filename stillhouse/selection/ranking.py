"""Rules that rank sequences (or whole documents), and which of them may be chosen at all.

Scores lie in the store one artifact a scorer; a `RankedPart` joins those of one token part and
gives the rule's value, larger is better. What must not be chosen is NaN: a row whose score is NaN,
that holds a document sharing 13-grams with the held-out text, or that the prior was trained on.
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stillhouse.selection.baselines import gumbel, random_scores, row_keys
from stillhouse.selection.color import color_score
from stillhouse.selection.sources import Sources
from stillhouse.storage.artifact import PartRef, Store
from stillhouse.storage.parquet import read_table
from stillhouse.text.pieces import Pieces, read_pieces

Rule = Literal["color", "own", "random", "conditional_only", "dsir", "rho_down"]
Grain = Literal["sequences", "documents"]
RULE_VERSION = 2
ELIGIBLE, CONTAMINATED, PRIOR_ROW, NAN = range(4)
REASONS = ("below the cut", "contaminated", "prior row", "nan")
"""Why a row was not kept, by its code; code 0 is an eligible row that was not good enough."""
SCORERS_OF: dict[Rule, tuple[str, ...]] = {
    "color": ("prior", "conditional"),
    "own": ("own",),
    "random": (),
    "conditional_only": ("conditional",),
    "dsir": ("dsir",),
    "rho_down": ("prior", "down"),
}


_FOR_THE_RECORD = {"prior", "conditional", "own"}


def scorers_read(rule: Rule, scored: Collection[str]) -> list[str]:
    """The scorers whose values a ranked part holds: the rule's, and the job's for the record.

    `scored`: the scorers that the job ran.
    """
    return sorted({*SCORERS_OF[rule], *_FOR_THE_RECORD.intersection(scored)})


@dataclass(frozen=True, slots=True)
class PartScores:
    """The joined values of one part's n rows."""

    value: NDArray[np.float32]
    """The rule's value; NaN where the row is not eligible."""
    raw: NDArray[np.float32]
    """The rule's value whatever the eligibility."""
    fate: NDArray[np.int8]
    """ELIGIBLE, CONTAMINATED, PRIOR_ROW or NAN."""
    losses: dict[str, NDArray[np.float32]]
    """What each scorer said, by name."""
    weight: NDArray[np.int64]
    """Tokens of each row."""
    seen: NDArray[np.bool_]
    """Whether the prior was trained on (a part of) the row."""


@dataclass(frozen=True, slots=True)
class RankedPart:
    """One token part under one rule; calling it gives its values. Small and picklable.

    Attributes:
        store: where everything lies.
        tokens: the part.
        scores: path of the scores part of each scorer that the rule or the report reads.
        contamination: path of the contamination scores; None to allow such rows.
        prior_rows: rows that the prior was trained on, ascending; None where there are none.
        exclude_prior_rows: whether these may not be chosen.
        rule, grain, seed: how to rank.
    """

    store: Store
    tokens: PartRef
    scores: dict[str, str]
    contamination: str | None
    prior_rows: NDArray[np.int64] | None
    exclude_prior_rows: bool
    rule: Rule
    grain: Grain
    seed: int

    def __call__(self) -> NDArray[np.float32]:
        """float32 [n], NaN where a row may not be chosen."""
        return self.read().value

    def weighted(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Values and tokens of each row, for budgets in tokens."""
        scores = self.read()
        return scores.value, scores.weight

    def with_sources(self, sources: Sources) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Values, and each row's source as a code: the one that owns most of its tokens."""
        pieces = read_pieces(read_table(self.store.path(self.tokens.path), ["documents"]))
        codes = sources.codes(pieces.sources)
        return self.read(pieces).value, codes[row_sources(pieces, self.grain)]

    def read(self, pieces: Pieces | None = None) -> PartScores:
        """Join the scores. Documents are summed over their pieces (`pieces` saves a read)."""
        if self.grain == "documents":
            return self._documents(pieces or self._pieces())
        losses = {name: self._values(path) for name, path in self.scores.items()}
        raw = self._rule(losses, self.tokens.num_rows)
        seen = np.zeros(self.tokens.num_rows, np.bool_)
        if self.prior_rows is not None:
            seen[self.prior_rows] = True
        fate = self._unless_seen(seen)
        if self.contamination:
            fate[self._values(self.contamination) > 0] = CONTAMINATED
        length = self.tokens.num_tokens // max(self.tokens.num_rows, 1)
        return _joined(raw, fate, losses, np.full(len(raw), length, np.int64), seen)

    def _unless_seen(self, seen: NDArray[np.bool_]) -> NDArray[np.int8]:
        return np.where(seen & self.exclude_prior_rows, PRIOR_ROW, ELIGIBLE).astype(np.int8)

    def _documents(self, pieces: Pieces) -> PartScores:
        owners = pieces.owners()
        count = int(owners[-1]) + 1 if len(owners) else 0
        losses = {n: self._document_means(p, owners, count) for n, p in self.scores.items()}
        seen = np.zeros(count, np.bool_)
        if self.prior_rows is not None:
            seen[owners[np.isin(pieces.sequence, self.prior_rows)]] = True
        fate = self._unless_seen(seen)
        if self.contamination:
            flagged = _flat(self._table(self.contamination)["piece_tokens"])
            fate[owners[flagged > 0]] = CONTAMINATED
        weight = np.bincount(owners, pieces.num_tokens, count).astype(np.int64)
        return _joined(self._rule(losses, count), fate, losses, weight, seen)

    def _document_means(
        self, path: str, owners: NDArray[np.int64], count: int
    ) -> NDArray[np.float32]:
        table = self._table(path)
        sums = np.bincount(owners, _flat(table["piece_nll_sum"]), count)
        tokens = np.bincount(owners, _flat(table["piece_tokens"]), count)
        with np.errstate(invalid="ignore", divide="ignore"):
            return (sums / tokens).astype(np.float32)

    def _rule(self, losses: dict[str, NDArray[np.float32]], count: int) -> NDArray[np.float32]:
        match self.rule:
            case "color":
                return color_score(losses["prior"], losses["conditional"])
            case "own":
                return losses["own"].copy()
            case "rho_down":
                return color_score(losses["prior"], losses["down"])
            case "conditional_only":
                return -losses["conditional"]
            case "dsir":
                noise = gumbel(row_keys(self.tokens.sha256, count), self.seed)
                return losses["dsir"] + noise
            case "random":
                return random_scores(self.tokens.sha256, count, self.seed)

    def _pieces(self) -> Pieces:
        return read_pieces(read_table(self.store.path(self.tokens.path), ["documents"]))

    def _table(self, path: str) -> pa.Table:
        return read_table(self.store.path(path))

    def _values(self, path: str) -> NDArray[np.float32]:
        return read_table(self.store.path(path), ["value"])["value"].to_numpy()


def count_fates(ranked: RankedPart) -> Counter[str]:
    """Rows of a part that may be chosen (`eligible`), and the others by reason."""
    counts = np.bincount(ranked.read().fate, minlength=len(REASONS)).tolist()
    return Counter(dict(zip(("eligible", *REASONS[1:]), counts, strict=True)))


def _flat(column: pa.ChunkedArray) -> NDArray[np.float64]:
    return column.combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.float64)


def _joined(
    raw: NDArray[np.float32],
    fate: NDArray[np.int8],
    losses: dict[str, NDArray[np.float32]],
    weight: NDArray[np.int64],
    seen: NDArray[np.bool_],
) -> PartScores:
    fate[np.isnan(raw)] = NAN
    value = np.where(fate == ELIGIBLE, raw, np.float32(np.nan))
    return PartScores(value, raw, fate, losses, weight, seen)


def row_sources(pieces: Pieces, grain: Grain) -> NDArray[np.int32]:
    """int32 [n], the index in `pieces.sources` of the source that owns most of a row's tokens.

    A row is a sequence or a document; of equal shares the source that comes first in `sources`.
    """
    row = pieces.owners() if grain == "documents" else pieces.sequence
    count = int(row[-1]) + 1 if len(row) else 0
    width = len(pieces.sources)
    if grain == "documents":
        first = np.searchsorted(row, np.arange(count))
        return pieces.source[first]
    key = row * width + pieces.source
    used, place = np.unique(key, return_inverse=True)
    tokens = np.bincount(place, pieces.num_tokens)
    order = np.lexsort((used, -tokens, used // width))
    firsts = order[np.flatnonzero(np.diff(used[order] // width, prepend=-1))]
    return (used[firsts] % width).astype(np.int32)
