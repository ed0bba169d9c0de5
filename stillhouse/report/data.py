"""What a selection's report shows: plain numbers and texts, stored as JSON beside the page.

`render` needs nothing else, so a page can be drawn again without the run. Losses and scores are
means over a sequence's predicted tokens, in nats per token; a score is prior minus conditional
loss (CoLoR-Filter, section 3), and larger is better. Everything below `ReportData`'s first block
may be missing: its section is then left out of the page.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from statistics import fmean, stdev
from typing import Literal

from pydantic import ConfigDict, TypeAdapter, with_config

BASELINE = "random"
"""The control that every other target model is compared with."""


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One source: tokens and sequences in pool and selection, its scores over the pool."""

    name: str
    pool_tokens: int
    kept_tokens: int
    pool_sequences: int
    kept_sequences: int
    mean_score: float | None
    std_score: float | None


@dataclass(frozen=True, slots=True)
class SourceShare:
    """A source's shares of all tokens in pool and selection; ratio is kept over pool share."""

    row: SourceRow
    pool: float
    kept: float
    ratio: float | None


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts of sequences by score: `edges` [n+1] ascending, `pool` and `kept` [n]."""

    edges: list[float]
    pool: list[int]
    kept: list[int]


@dataclass(frozen=True, slots=True)
class SeenUnseen:
    """Scores of sequences that the prior was trained on, against all others."""

    seen_rows: int
    seen_mean: float
    unseen_rows: int
    unseen_mean: float
    excluded: bool
    """Whether the seen ones were kept out of the selection (`exclude_prior_rows`)."""


@dataclass(frozen=True, slots=True)
class TargetScores:
    """The scores of held-out target text, which nothing was trained on, against the pool's."""

    mean: float
    std: float
    count: int
    pool_mean: float
    pool_std: float
    pool_count: int


@dataclass(frozen=True, slots=True)
class Density:
    """Counts [x, y] of sequences by prior loss (`x_edges` [x+1]) and conditional (`y_edges`)."""

    x_edges: list[float]
    y_edges: list[float]
    pool: list[list[int]]
    kept: list[list[int]]


@dataclass(frozen=True, slots=True)
class ExampleRow:
    """A sequence to look at: its text, losses, address, and why it was kept or not."""

    group: Literal["best", "above", "below", "worst"]
    score: float
    prior_nll: float | None
    conditional_nll: float | None
    source: str
    text: str
    part: str
    row: int
    document_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Curve:
    """Held-out loss of one target model over its training: `points` of (tokens, nats)."""

    name: str
    seed: int
    points: list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """How one of the job's models was trained."""

    name: str
    num_tokens: int
    num_steps: int
    learning_rate: float
    """Its peak."""
    global_batch: int
    """Sequences a step."""
    final_loss: float
    late_fall: float | None
    """Nats that it still fell by in the last tenth of the steps (`divergence.late_fall`)."""


@dataclass(frozen=True, slots=True)
class TargetLossRow:
    """One selection rule's target models: final held-out `losses`, one per seed, in seed order."""

    name: str
    num_tokens: int
    losses: list[float]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return fmean(self.losses)

    @property
    def spread(self) -> float | None:
        """Sample standard deviation over the seeds; None for a single one."""
        return _spread(self.losses)


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean and spread over seeds of a target's loss minus the baseline's, same seeds paired."""

    mean: float
    spread: float | None
    num_seeds: int = 1


@dataclass(frozen=True, slots=True)
class Drop:
    """What was never kept for one reason; a count that the reason does not have is None."""

    reason: str
    sequences: int | None
    documents: int | None
    tokens: int | None


@dataclass(frozen=True, slots=True)
class BadInput:
    """An input row that could not be read: where it is, why, and how it begins."""

    file: str
    row: int
    reason: str
    preview: str


@dataclass(frozen=True, slots=True)
class DeadLetters:
    """How many input rows could not be read, and the first few."""

    total: int
    first: list[BadInput]


@dataclass(frozen=True, slots=True)
class StepCost:
    """What a step cost. `paper_units`: auxiliary forward passes of one token (paper, section 5)."""

    step: str
    tokens: int
    flops: float
    seconds: float
    paper_units: float | None
    reused: bool
    """True where an earlier run had paid for it."""


@dataclass(frozen=True, slots=True)
class HealthWarning:
    """One reason to doubt the selection: what was seen; what it means and what to do."""

    title: str
    detail: str


@with_config(ConfigDict(ser_json_inf_nan="strings", extra="forbid"))
@dataclass(frozen=True, slots=True)
class ReportData:
    """Everything the page shows. Lists keep their order on the page, sources are sorted."""

    title: str
    created: str
    """ISO 8601."""
    run_uri: str
    rule: str
    """The size rule as in the spec, such as `tau = 8`."""
    grain: Literal["sequences", "documents"]
    pool_sequences: int
    pool_tokens: int
    kept_sequences: int
    kept_tokens: int
    eligible_sequences: int
    eligible_tokens: int
    threshold: float
    """Score of the last one kept."""
    sources: list[SourceRow]
    scorer: str | None = None
    """The user's scorer, where one stands for prior and conditional; scores have its unit."""
    score_histogram: Histogram | None = None
    seen: SeenUnseen | None = None
    target_scores: TargetScores | None = None
    losses: Density | None = None
    examples: list[ExampleRow] = field(default_factory=list[ExampleRow])
    curves: list[Curve] = field(default_factory=list[Curve])
    targets: list[TargetLossRow] = field(default_factory=list[TargetLossRow])
    trainings: list[TrainingRow] = field(default_factory=list[TrainingRow])
    drops: list[Drop] = field(default_factory=list[Drop])
    dead_letters: DeadLetters = DeadLetters(0, [])
    costs: list[StepCost] = field(default_factory=list[StepCost])
    paper: dict[str, float] = field(default_factory=dict[str, float])
    """Method -> total by the paper's formula, in auxiliary forward passes of one token."""
    warnings: list[HealthWarning] = field(default_factory=list[HealthWarning])
    spec_yaml: str = ""
    artifacts: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    environment: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])

    @property
    def main(self) -> str:
        """The rule of the selection, as its target model is named; the others are controls."""
        return "color" if self.scorer is None else "own"


def source_shares(data: ReportData) -> list[SourceShare]:
    """Every source's shares, by kept share downwards, then pool share, then name."""
    pool = max(1, sum(row.pool_tokens for row in data.sources))
    kept = max(1, sum(row.kept_tokens for row in data.sources))
    shares = [_share(row, row.pool_tokens / pool, row.kept_tokens / kept) for row in data.sources]
    return sorted(shares, key=lambda share: (-share.kept, -share.pool, share.row.name))


def difference(row: TargetLossRow, baseline: TargetLossRow) -> Difference:
    """Loss of `row` minus `baseline`; the spread is of paired seeds, where there are pairs."""
    if len(row.losses) != len(baseline.losses):
        return Difference(row.mean - baseline.mean, None)
    paired = [mine - other for mine, other in zip(row.losses, baseline.losses, strict=True)]
    return Difference(fmean(paired), _spread(paired), len(paired))


def to_json(data: ReportData) -> bytes:
    """UTF-8 JSON of the report; NaN and infinities as strings, which `from_json` reads back."""
    return _adapter().dump_json(data, indent=1)


def from_json(document: bytes) -> ReportData:
    """The report that `to_json` wrote; ValueError where `document` is something else."""
    return _adapter().validate_json(document)


@cache
def _adapter() -> TypeAdapter[ReportData]:
    return TypeAdapter(ReportData)


def _share(row: SourceRow, pool: float, kept: float) -> SourceShare:
    return SourceShare(row, pool, kept, kept / pool if pool else None)


def _spread(values: Iterable[float]) -> float | None:
    values = list(values)
    return stdev(values) if len(values) > 1 else None
