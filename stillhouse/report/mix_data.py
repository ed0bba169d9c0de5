"""What a mix job's report shows: plain numbers and texts, stored as JSON beside the page.

`render` needs nothing else, so a page can be drawn again without the run. Losses are means over
the predicted tokens in nats; a gradient pass is a forward and backward of one micro-batch.
"""

from dataclasses import dataclass, field
from functools import cache
from statistics import fmean, stdev

from pydantic import ConfigDict, TypeAdapter, with_config

from stillhouse.report.data import Curve


@dataclass(frozen=True, slots=True)
class SeedRow:
    """One run: of a policy with a seed, measured on the target's test rows."""

    seed: int
    heldout_nll: float
    accuracy: float | None
    interval: tuple[float, float] | None
    gradient_passes: int
    num_steps: int
    best_step: int
    seconds: float


@dataclass(frozen=True, slots=True)
class PolicyRow:
    """A policy or control with all its seeds."""

    name: str
    seeds: list[SeedRow]

    @property
    def heldout(self) -> tuple[float, float | None]:
        """Mean over the seeds, and their standard deviation."""
        return _spread([row.heldout_nll for row in self.seeds])

    @property
    def accuracy(self) -> tuple[float, float | None] | None:
        """Mean over the seeds, and their standard deviation; None for targets without choices."""
        found = [row.accuracy for row in self.seeds if row.accuracy is not None]
        return _spread(found) if found else None


def _spread(values: list[float]) -> tuple[float, float | None]:
    return fmean(values), stdev(values) if len(values) > 1 else None


@dataclass(frozen=True, slots=True)
class Heat:
    """Shares of the arms over a policy's run, mean over the seeds.

    Attributes:
        arms: names, most drawn first.
        shares: of arm i in the steps of bin j: [K][B]. The law in force for policies that draw
            by one, the draws themselves for those that play a maximum.
        num_steps: of the run.
    """

    policy: str
    arms: list[str]
    shares: list[list[float]]
    num_steps: int


@dataclass(frozen=True, slots=True)
class ArmRow:
    """An arm under the policy: draws of all seeds, its rewards' mean and standard deviation."""

    name: str
    num_rows: int
    draws: int
    share: float
    reward: float | None
    spread: float | None


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, slots=True)
class MixReport:
    """One mix job.

    Attributes:
        main: name of the policy; the others are controls.
        curves: held-out loss over steps; `passes`: over gradient passes; `effective`: effective
            number of arms, the exponential of the law's entropy, over steps.
        cumulative: draws of the most drawn arms so far, over steps, a curve of each seed.
        rows: what became of the arms' rows, by reason.
        skipped: arms that were left out, and why.
        chance: accuracy of a guess among the choices; None without choices.
    """

    title: str
    created: str
    run_uri: str
    main: str
    num_arms: int
    num_shots: int
    test_rows: int
    policies: list[PolicyRow]
    heats: list[Heat]
    curves: list[Curve]
    passes: list[Curve]
    effective: list[Curve]
    arms: list[ArmRow]
    cumulative: list[Curve] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    chance: float | None = None
    spec_yaml: str = ""
    artifacts: list[tuple[str, str]] = field(default_factory=list)
    environment: list[tuple[str, str]] = field(default_factory=list)


@cache
def _adapter() -> TypeAdapter[MixReport]:
    return TypeAdapter(MixReport)


def to_json(data: MixReport) -> bytes:
    """The report as JSON."""
    return _adapter().dump_json(data, indent=1)


def from_json(data: bytes) -> MixReport:
    """The report in these bytes; ValueError where they are not one."""
    return _adapter().validate_json(data)
