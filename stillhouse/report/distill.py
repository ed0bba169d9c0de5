"""A distillation's report: plain numbers and pictures, stored as JSON, drawn as one HTML page."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from statistics import fmean, stdev
from typing import Literal

from pydantic import TypeAdapter

from stillhouse.report import charts
from stillhouse.report.data import Curve, HealthWarning
from stillhouse.report.render import environment

MAIN = "synthetic"


@dataclass(frozen=True, slots=True)
class ClassRow:
    """Pictures of one class as base64 PNG: real ones it started from, and what was made."""

    name: str
    starts: list[str]
    made: list[str]


@dataclass(frozen=True, slots=True)
class Stage:
    """The first image of every class after `iteration` updates."""

    iteration: int
    images: list[str]


@dataclass(frozen=True, slots=True)
class SetRow:
    """A set in the table of methods; `images_per_class` 0: all of them."""

    name: str
    images_per_class: float
    num_bytes: int
    accuracies: list[float]
    seconds: float | None

    @property
    def mean(self) -> float:
        """Of the accuracies."""
        return fmean(self.accuracies)

    @property
    def spread(self) -> float | None:
        """Their standard deviation."""
        return stdev(self.accuracies) if len(self.accuracies) > 1 else None


@dataclass(frozen=True, slots=True)
class OtherSet:
    """What another job of the store made of the same images, judged on the same network.

    Attributes:
        method: as people write it.
        images_per_class: its budget.
        num_bytes: labels included.
        mean: test accuracy in [0, 1].
        std: over the seeds, 0 for one.
        judged_by: how networks were trained on it; figures of different ways do not compare.
        seconds: to make it.
        run: fingerprint of its run.
    """

    method: str
    images_per_class: int
    num_bytes: int
    mean: float
    std: float
    judged_by: str
    seconds: float
    run: str


@dataclass(frozen=True, slots=True)
class StepRow:
    """A step: tasks, those that were found finished, and the time of this run."""

    name: str
    parts: int
    reused: int
    seconds: float
    device_seconds: float


@dataclass(frozen=True, slots=True)
class DistillReport:
    """Everything that the page shows. Accuracies in [0, 1]."""

    title: str
    created: str
    run_uri: str
    method: str
    network: str
    images_per_class: int
    num_classes: int
    num_train: int
    image_side: int
    image_bytes: int
    label_bytes: int
    learning_rate: float | None
    iteration: int
    validation: list[float]
    rows: list[SetRow]
    networks: list[SetRow]
    classes: list[ClassRow]
    stages: list[Stage]
    losses: list[Curve]
    accuracy: list[Curve]
    experts: list[Curve]
    steps: list[StepRow]
    peak_bytes: int | None
    warnings: list[HealthWarning]
    spec_yaml: str
    artifacts: list[tuple[str, str]]
    environment: list[tuple[str, str]]
    job: Literal["distill"] = "distill"
    others: list[OtherSet] = field(default_factory=list[OtherSet])
    """By method and images a class; a job has one of each."""
    judged_by: str = ""
    began: bool = False
    """Whether the real images shown are those that the set began as."""
    num_images: int = 0
    """Of the set; INFER's are more than its budget, for compensators are shared."""
    control_networks: list[list[SetRow]] = field(default_factory=list[list[SetRow]])
    """Of each control, `rows` behind the first, a row a network as in `networks`."""

    @property
    def learned_from(self) -> str:
        """What the set was learned from."""
        decoupled = self.method in ("sre2l", "infer", "rded", "nrr_dd")
        return "teachers" if decoupled else "experts"

    @property
    def num_bytes(self) -> int:
        """Of the set, labels included."""
        return self.image_bytes + self.label_bytes


def render_distill(data: DistillReport) -> str:
    """The page, as text to be written in UTF-8."""
    baseline = next((row for row in data.rows if row.name == "random real"), None)
    return (
        environment()
        .get_template("distill.html.j2")
        .render(data=data, charts=charts, main=data.rows[0], baseline=baseline)
    )


def smoothed(losses: Sequence[float], most: int = 200) -> list[tuple[float, float]]:
    """At most `most` points (iteration, mean loss of its stretch) of a long list of losses."""
    width = max(1, -(-len(losses) // most))
    return [
        (float(start + len(stretch)), fmean(stretch))
        for start in range(0, len(losses), width)
        for stretch in [losses[start : start + width]]
    ]


def to_json(data: DistillReport) -> bytes:
    """UTF-8 JSON of the report."""
    return _adapter().dump_json(data, indent=1)


def from_json(document: bytes) -> DistillReport:
    """The report that `to_json` wrote; ValueError where `document` is something else."""
    return _adapter().validate_json(document)


@cache
def _adapter() -> TypeAdapter[DistillReport]:
    return TypeAdapter(DistillReport)
