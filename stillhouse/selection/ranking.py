"""The values of sequences (or whole documents) under a rule, and whether they are eligible.

Scores lie in the store as one artifact for each scorer; a `RankedPart` joins those of one token
part and computes the rule's value, larger is better. Not eligible is a row without a value (NaN),
one that holds a document that shares 13-grams with held-out text or a benchmark, one the prior was
trained on, or one that holds a document that was taken down.
"""

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stillhouse.selection.quotas import Sources
from stillhouse.selection.rules import NamedRule, RankedRows
from stillhouse.storage.artifact import PartRef, Store
from stillhouse.storage.parquet import read_rows, read_table
from stillhouse.storage.task import Output, Place, Task
from stillhouse.text.pieces import Grain, Pieces, read_pieces, row_sources

RULE_VERSION = 2
ELIGIBLE, CONTAMINATED, PRIOR_ROW, NAN, TAKEN_DOWN = range(5)
REASONS = ("below the cut", "contaminated", "prior row", "nan", "taken down")
"""Why a row was not kept, by its status; status 0 is an eligible row that was not good enough."""
LOSS_COLUMNS = ("prior", "conditional")
RANKS_SCHEMA = pa.schema(
    [("value", pa.float32()), ("fate", pa.int8()), ("weight", pa.int32()), ("source", pa.int32())]
    + [("seen", pa.bool_()), ("benchmark", pa.int32())]
    + [(name, pa.float32()) for name in LOSS_COLUMNS]
)
Span: TypeAlias = tuple[float, float]


def scorers_read(rule: NamedRule, available: Collection[str]) -> list[str]:
    """The scorers whose values a ranked part holds: the rule's, and those for the record."""
    return sorted({*rule.scorers, *{"prior", "conditional", "own"}.intersection(available)})


def row_keys(part_fingerprint: str, num_rows: int) -> NDArray[np.uint64]:
    """A key for each row of a part, by what the part holds, not where it lies: uint64[num_rows]."""
    start = int.from_bytes(hashlib.sha256(part_fingerprint.encode()).digest()[:8], "big")
    return np.uint64(start) + np.arange(num_rows, dtype=np.uint64)


@dataclass(frozen=True, slots=True)
class PartScores:
    """The joined scores of one part's n rows.

    Attributes:
        raw: float32 [n], the rule's value, eligible or not.
        fate: int8 [n], ELIGIBLE, CONTAMINATED, PRIOR_ROW, NAN or TAKEN_DOWN.
        losses: float32 [n] of each scorer.
        weight: int64 [n], tokens.
        seen: bool [n], whether the prior was trained on (a part of) the row.
        benchmark: int32 [n], the number of a benchmark's file that shares text with it, else 0.
    """

    raw: NDArray[np.float32]
    fate: NDArray[np.int8]
    losses: dict[str, NDArray[np.float32]]
    weight: NDArray[np.int64]
    seen: NDArray[np.bool_]
    benchmark: NDArray[np.int32]

    @property
    def value(self) -> NDArray[np.float32]:
        """The rule's value, NaN where a row is not eligible."""
        return np.where(self.fate == ELIGIBLE, self.raw, np.float32(np.nan))


@dataclass(frozen=True, slots=True)
class RankedPart:
    """One token part under one rule. Small and picklable.

    Attributes:
        scores: path of the part's scores by each scorer that the rule or the report reads.
        contamination: path of the contamination scores; None to allow such rows.
        benchmarks: the same, for the files of benchmarks.
        prior_rows: rows that the prior was trained on, ascending; None where there are none.
        exclude_prior_rows: whether these are not eligible.
        taken_down: rows (of this grain) that hold a document that was taken down, or None.
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
    benchmarks: str | None = None
    taken_down: NDArray[np.int64] | None = None

    def pieces(self) -> Pieces:
        return read_pieces(self._read(self.tokens.path, "documents"))

    def read(self, pieces: Pieces | None = None) -> PartScores:
        """Join the scores. Documents are summed over their pieces (`pieces` saves a read)."""
        prior_rows = np.zeros(0, np.int64) if self.prior_rows is None else self.prior_rows
        flagged = np.zeros(0, np.int64)
        if self.grain == "documents":
            pieces = pieces or self.pieces()
            owners = pieces.owners()
            count = int(owners[-1]) + 1 if len(owners) else 0
            weight = np.bincount(owners, pieces.num_tokens, count).astype(np.int64)
            benchmark = np.zeros(count, np.int32)
            losses = {n: self._document_means(p, owners, count) for n, p in self.scores.items()}
            prior_rows = owners[np.isin(pieces.sequence, prior_rows)]
            if self.contamination:
                flagged = owners[self._flagged_pieces(self.contamination)]
            if self.benchmarks:
                hit, values = self._flagged_pieces(self.benchmarks), self._values(self.benchmarks)
                benchmark[owners[hit]] = values[pieces.sequence[hit]]
        else:
            count = self.tokens.num_rows
            weight = np.full(count, self.tokens.num_tokens // max(count, 1), np.int64)
            benchmark = np.zeros(count, np.int32)
            losses = {name: self._values(path) for name, path in self.scores.items()}
            if self.contamination:
                flagged = np.flatnonzero(self._values(self.contamination) > 0)
            if self.benchmarks:
                benchmark = self._values(self.benchmarks).astype(np.int32)
        seen = np.zeros(count, np.bool_)
        seen[prior_rows] = True
        fate = np.where(seen & self.exclude_prior_rows, PRIOR_ROW, ELIGIBLE).astype(np.int8)
        fate[flagged] = CONTAMINATED
        fate[benchmark > 0] = CONTAMINATED
        rows = RankedRows(weight, row_keys(self.tokens.sha256, count), self.seed)
        raw = self.rule.values({name: losses[name] for name in self.rule.scorers}, rows)
        fate[np.isnan(raw)] = NAN
        if self.taken_down is not None:
            fate[self.taken_down] = TAKEN_DOWN
        return PartScores(raw, fate, losses, weight, seen, benchmark)

    def _flagged_pieces(self, path: str) -> NDArray[np.bool_]:
        return _flat(self._read(path, "piece_tokens")["piece_tokens"]) > 0

    def _document_means(
        self, path: str, owners: NDArray[np.int64], count: int
    ) -> NDArray[np.float32]:
        table = self._read(path, "piece_nll_sum", "piece_tokens")
        sums, tokens = (np.bincount(owners, _flat(column), count) for column in table.columns)
        with np.errstate(invalid="ignore", divide="ignore"):
            return (sums / tokens).astype(np.float32)

    def _values(self, path: str) -> NDArray[np.float32]:
        return self._read(path, "value")["value"].to_numpy()

    def _read(self, path: str, *columns: str) -> pa.Table:
        return read_table(self.store.path(path), list(columns))


def _flat(column: pa.ChunkedArray) -> NDArray[np.float64]:
    return column.combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.float64)


@dataclass(frozen=True)
class RankTask(Task):
    """Makes one table of the ranked rows of several token parts, which cut and selection read.

    `info` has for each part its rows, these by status, and the spans of the values and losses.

    Attributes:
        parts: in order.
        sources: those that rows are counted for; None where no share is asked for.
    """

    KIND = "ranks"

    parts: tuple[RankedPart, ...]
    sources: Sources | None

    def run(self, store: Store, host: Any, loaded: Any) -> Output:
        """One table of `RANKS_SCHEMA`."""
        tables, infos = zip(*map(self._rank, self.parts), strict=True)
        return Output([pa.concat_tables(tables)], info={"parts": list(infos)})

    def _rank(self, ranked: RankedPart) -> tuple[pa.Table, dict[str, Any]]:
        if self.sources is None:
            scores = ranked.read()
            source = np.zeros(len(scores.raw), np.int32)
        else:
            pieces = ranked.pieces()
            scores = ranked.read(pieces)
            source = self.sources.codes(pieces.sources)[row_sources(pieces, ranked.grain)]
        losses = {name: scores.losses.get(name) for name in LOSS_COLUMNS}
        columns = {
            "value": scores.raw,
            "fate": scores.fate,
            "weight": scores.weight.astype(np.int32),
            "source": source,
            "seen": scores.seen,
            "benchmark": scores.benchmark,
            **{name: pa.nulls(len(source)) if x is None else x for name, x in losses.items()},
        }
        counts = np.bincount(scores.fate, minlength=len(REASONS)).tolist()
        known = [values for values in losses.values() if values is not None]
        info = {
            "rows": len(source),
            "fates": dict(zip(("eligible", *REASONS[1:]), counts, strict=True)),
            "span": data_span(scores.raw),
            "loss_span": data_span(np.concatenate(known)) if known else None,
        }
        return pa.table(columns, schema=RANKS_SCHEMA), info


@dataclass(frozen=True, slots=True)
class PartRanks:
    """The ranked rows of one token part: some rows of a `RankTask`'s table.

    Attributes:
        table: the task's part.
        start: its first row there.
    """

    table: PartRef
    start: int
    num_rows: int

    def read(self, store: Store) -> PartScores:
        """What `RankedPart.read` returned, of the scorers in `LOSS_COLUMNS`."""
        uri, stop = store.path(self.table.path), self.start + self.num_rows
        found = read_rows(uri, self.table.num_bytes, self.start, stop)
        losses = {n: found[n].to_numpy() for n in LOSS_COLUMNS if not found[n].null_count}
        return PartScores(
            raw=found["value"].to_numpy(),
            fate=found["fate"].to_numpy(),
            losses=losses,
            weight=found["weight"].to_numpy().astype(np.int64),
            seen=found["seen"].to_numpy(),
            benchmark=found["benchmark"].to_numpy(),
        )


@dataclass(frozen=True, slots=True)
class Ranks:
    """The table of a `RankTask`, as the cut reads it."""

    uri: str

    def __call__(self) -> NDArray[np.float32]:
        """The rule's values, float32 [n], NaN where a row is not eligible."""
        return self._read()[0]

    def weighted(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Values, and the number of tokens of each row."""
        value, weight = self._read("weight")
        return value, weight.astype(np.int64)

    def with_sources(self) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Values, and the code of the source that owns most of each row."""
        value, source = self._read("source")
        return value, source

    def _read(self, *columns: str) -> list[NDArray[Any]]:
        table = read_table(self.uri, ["value", "fate", *columns])
        value, fate, *others = (column.to_numpy() for column in table.columns)
        return [np.where(fate == ELIGIBLE, value, np.float32(np.nan)), *others]


def data_span(values: NDArray[np.float32]) -> Span | None:
    """The smallest and largest finite value, without outliers.

    The span extends at most the width of the middle 99.8 % of values beyond that on either side.
    """
    finite = values[np.isfinite(values)].astype(np.float64)
    if not finite.size:
        return None
    low, high = np.quantile(finite, (0.001, 0.999))
    width = high - low
    return max(float(finite.min()), low - width), min(float(finite.max()), high + width)
