"""Sequences (or whole documents) under a rule, and which of them may be chosen at all.

Scores lie in the store one artifact a scorer; a `RankedPart` joins those of one token part and
gives the rule's value, larger is better. What must not be chosen is NaN: a row whose score is NaN,
that holds a document sharing 13-grams with the held-out text, or that the prior was trained on.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stillhouse.selection.baselines import row_keys
from stillhouse.selection.rules import NamedRule, RankedRows
from stillhouse.selection.sources import Sources
from stillhouse.storage.artifact import PartRef, Store
from stillhouse.storage.parquet import read_table
from stillhouse.storage.task import Output, Place, Task
from stillhouse.text.pieces import Grain, Pieces, read_pieces, row_sources

RULE_VERSION = 2
ELIGIBLE, CONTAMINATED, PRIOR_ROW, NAN = range(4)
REASONS = ("below the cut", "contaminated", "prior row", "nan")
"""Why a row was not kept, by its code; code 0 is an eligible row that was not good enough."""
RANKS_SCHEMA = pa.schema(
    [("value", pa.float32()), ("fate", pa.int8()), ("weight", pa.int32()), ("source", pa.int32())]
)
"""Thirteen bytes a row."""
LOSS_COLUMNS = ("prior", "conditional")
Span: TypeAlias = tuple[float, float]
_FOR_THE_RECORD = {"prior", "conditional", "own"}


def scorers_read(rule: NamedRule, scored: Collection[str]) -> list[str]:
    """The scorers whose values a ranked part holds: the rule's, and the job's for the record.

    `scored`: the scorers that the job ran.
    """
    return sorted({*rule.scorers, *_FOR_THE_RECORD.intersection(scored)})


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
    """One token part under one rule. Small and picklable.

    Attributes:
        store: where everything lies.
        tokens: the part.
        scores: path of the scores part of each scorer that the rule or the report reads.
        contamination: path of the contamination scores; None to allow such rows.
        prior_rows: rows that the prior was trained on, ascending; None where there are none.
        exclude_prior_rows: whether these may not be chosen.
        rule, grain, seed: how to rank.
    """

    store: Place[Store]
    tokens: PartRef
    scores: dict[str, str]
    contamination: str | None
    prior_rows: NDArray[np.int64] | None
    exclude_prior_rows: bool
    rule: NamedRule
    grain: Grain
    seed: int

    def read(self, pieces: Pieces | None = None) -> PartScores:
        """Join the scores. Documents are summed over their pieces (`pieces` saves a read)."""
        if self.grain == "documents":
            return self._documents(pieces or self._pieces())
        losses = {name: self._values(path) for name, path in self.scores.items()}
        length = self.tokens.num_tokens // max(self.tokens.num_rows, 1)
        weight = np.full(self.tokens.num_rows, length, np.int64)
        seen = np.zeros(self.tokens.num_rows, np.bool_)
        if self.prior_rows is not None:
            seen[self.prior_rows] = True
        fate = self._unless_seen(seen)
        if self.contamination:
            fate[self._values(self.contamination) > 0] = CONTAMINATED
        return self._joined(fate, losses, weight, seen)

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
        return self._joined(fate, losses, weight, seen)

    def _document_means(
        self, path: str, owners: NDArray[np.int64], count: int
    ) -> NDArray[np.float32]:
        table = self._table(path)
        sums = np.bincount(owners, _flat(table["piece_nll_sum"]), count)
        tokens = np.bincount(owners, _flat(table["piece_tokens"]), count)
        with np.errstate(invalid="ignore", divide="ignore"):
            return (sums / tokens).astype(np.float32)

    def _joined(
        self,
        fate: NDArray[np.int8],
        losses: dict[str, NDArray[np.float32]],
        weight: NDArray[np.int64],
        seen: NDArray[np.bool_],
    ) -> PartScores:
        rows = RankedRows(weight, row_keys(self.tokens.sha256, len(weight)), self.seed)
        raw = self.rule.values({name: losses[name] for name in self.rule.scorers}, rows)
        fate[np.isnan(raw)] = NAN
        value = np.where(fate == ELIGIBLE, raw, np.float32(np.nan))
        return PartScores(value, raw, fate, losses, weight, seen)

    def _pieces(self) -> Pieces:
        return read_pieces(read_table(self.store.path(self.tokens.path), ["documents"]))

    def _table(self, path: str) -> pa.Table:
        return read_table(self.store.path(path))

    def _values(self, path: str) -> NDArray[np.float32]:
        return read_table(self.store.path(path), ["value"])["value"].to_numpy()


def _flat(column: pa.ChunkedArray) -> NDArray[np.float64]:
    return column.combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.float64)


@dataclass(frozen=True)
class RankTask(Task):
    """The values of one token part as a small table, which the cut reads instead of tokens.

    `info` counts what became of the rows and has the ends of the values and of the losses.

    Attributes:
        ranked: the part under a rule.
        sources: those that rows are counted for; None where no share is asked for.
    """

    KIND = "ranks"

    ranked: RankedPart
    sources: Sources | None

    def run(self, store: Store, host: Any, loaded: Any) -> Output:
        """One table of `RANKS_SCHEMA`."""
        ranked, pieces = self.ranked, None
        if self.sources is not None or ranked.grain == "documents":
            pieces = read_pieces(read_table(store.path(ranked.tokens.path), ["documents"]))
        found = ranked.read(pieces)
        source = np.zeros(len(found.raw), np.int32)
        if self.sources is not None and pieces is not None:
            source = self.sources.codes(pieces.sources)[row_sources(pieces, ranked.grain)]
        weight = found.weight.astype(np.int32)
        table = pa.Table.from_arrays(
            [pa.array(column) for column in (found.raw, found.fate, weight, source)],
            schema=RANKS_SCHEMA,
        )
        counts = np.bincount(found.fate, minlength=len(REASONS)).tolist()
        losses = [found.losses[name] for name in LOSS_COLUMNS if name in found.losses]
        info = {
            "fates": dict(zip(("eligible", *REASONS[1:]), counts, strict=True)),
            "span": data_span(found.raw),
            "loss_span": data_span(np.concatenate(losses)) if losses else None,
        }
        return Output([table], info=info)


@dataclass(frozen=True, slots=True)
class Ranks:
    """What the cut knows of one part: the table that a `RankTask` made."""

    uri: str

    def __call__(self) -> NDArray[np.float32]:
        """The rule's values, float32 [n], NaN where a row may not be chosen."""
        return self._read([])[0]

    def weighted(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Values and tokens of each row, for budgets in tokens."""
        value, weight = self._read(["weight"])
        return value, weight.astype(np.int64)

    def with_sources(self) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Values, and the code of the source that owns most of each row."""
        value, source = self._read(["source"])
        return value, source

    def _read(self, columns: list[str]) -> list[NDArray[Any]]:
        table = read_table(self.uri, ["value", "fate", *columns])
        value, fate, *others = (column.to_numpy() for column in table.columns)
        return [np.where(fate == ELIGIBLE, value, np.float32(np.nan)), *others]


def data_span(values: NDArray[np.float32]) -> Span | None:
    """The least and the greatest of the finite values, as far as they are no outliers.

    Further out than once more the width of the middle 99.8 % lies nothing worth a bin.
    """
    finite = values[np.isfinite(values)].astype(np.float64)
    if not finite.size:
        return None
    low, high = np.quantile(finite, (0.001, 0.999))
    width = high - low
    return max(float(finite.min()), low - width), min(float(finite.max()), high + width)
