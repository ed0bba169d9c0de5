"""What a training's report shows: plain numbers and texts, stored as JSON beside the page.

Losses are means over predicted tokens, in nats.
"""

from dataclasses import dataclass, field
from functools import cache

from pydantic import TypeAdapter

from stillhouse.report.data import HealthWarning, StepCost

Points = list[tuple[int, float]]
"""Tokens trained on so far, and a value there."""


@dataclass(frozen=True, slots=True)
class Start:
    """The training began, or went on: after so many tokens, with so many workers."""

    tokens: int
    workers: int


@dataclass(frozen=True, slots=True)
class SourceCurve:
    """Losses of one source over the training; either may be missing."""

    name: str
    heldout: Points
    trained: Points


@dataclass(frozen=True, slots=True)
class DataRow:
    """A data set: its share of the batches, its size, and how often it was gone through."""

    name: str
    share: float
    num_sequences: int
    epochs: float


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """Everything on the page of a train job."""

    title: str
    created: str
    run_uri: str
    num_parameters: int
    num_tokens: int
    num_steps: int
    global_batch: int
    learning_rate: float
    """Its peak."""
    sequence_length: int
    heldout: Points
    """Held-out loss; empty where nothing was held out."""
    loss: Points
    tokens_per_s: Points
    data_wait: Points
    """Share of the time that the first worker waited for data."""
    grad_norm: Points
    mean_tokens_per_s: float
    data_wait_share: float
    mfu: float | None
    starts: list[Start]
    sources: list[SourceCurve] = field(default_factory=list[SourceCurve])
    data: list[DataRow] = field(default_factory=list[DataRow])
    order_sha256: str = ""
    costs: list[StepCost] = field(default_factory=list[StepCost])
    warnings: list[HealthWarning] = field(default_factory=list[HealthWarning])
    spec_yaml: str = ""
    artifacts: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    environment: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])

    @property
    def restarts(self) -> list[Start]:
        """The starts after the first."""
        return self.starts[1:]

    @property
    def compares_heldout(self) -> bool:
        """Whether sources are compared by what was held out: two of them at least have some."""
        return sum(bool(one.heldout) for one in self.sources) > 1

    @property
    def compared(self) -> dict[str, Points]:
        """The losses by which sources are compared, all of one kind; the largest sources first."""
        held = self.compares_heldout
        curves = {one.name: one.heldout if held else one.trained for one in self.sources}
        return {name: points for name, points in curves.items() if points}


def to_json(data: TrainingReport) -> bytes:
    """UTF-8 JSON of the report."""
    return _adapter().dump_json(data, indent=1)


def from_json(document: bytes) -> TrainingReport:
    """The report that `to_json` wrote; ValueError where `document` is something else."""
    return _adapter().validate_json(document)


@cache
def _adapter() -> TypeAdapter[TrainingReport]:
    return TypeAdapter(TrainingReport)
