"""The key `sweep` of a job: variants of its spec, of which the best is its result."""

import itertools
import math
from collections.abc import Mapping
from copy import deepcopy
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
import yaml
from pydantic import (
    Discriminator,
    Field,
    SerializeAsAny,
    Tag,
    field_validator,
    model_validator,
)

from stillhouse.classification.spec import ClassifySpec
from stillhouse.errors import SpecError
from stillhouse.jobs.kinds import spec_model
from stillhouse.settings import Count, Settings
from stillhouse.spec import NOT_IDENTITY, JobSpec
from stillhouse.training.spec import TrainSpec

Value: TypeAlias = float | int | str | bool | None


class SweepRange(Settings):
    """Numbers between two limits; whole ones if both limits are."""

    min: float
    max: float
    log: bool = Field(default=False, description="drawn by their logarithm")

    @model_validator(mode="after")
    def _ordered(self) -> "SweepRange":
        if not self.min < self.max:
            raise ValueError("`min` has to be below `max`")
        if self.log and self.min <= 0:
            raise ValueError("`log` needs a `min` above 0")
        return self

    @property
    def whole(self) -> bool:
        return not self.log and self.min.is_integer() and self.max.is_integer()

    def at(self, share: float) -> float | int:
        """The number at a share in [0, 1) of the range."""
        if self.whole:
            return int(self.min + math.floor(share * (self.max - self.min + 1)))
        if self.log:
            return math.exp(math.log(self.min) + share * math.log(self.max / self.min))
        return self.min + share * (self.max - self.min)


def _form(value: Any) -> str:
    return "[range]" if isinstance(value, Mapping | SweepRange) else "[values]"


_Tried: TypeAlias = Annotated[
    Annotated[list[Any], Field(min_length=1), Tag("[values]")]
    | Annotated[SweepRange, Tag("[range]")],
    Discriminator(_form),
]


class StopSettings(Settings):
    """Which variants are stopped before their end, by a scheduler of Ray Tune."""

    name: Literal["asha", "median"] = Field(
        description="asha: after 1, 4, 16, ... evaluations only the best quarter of those so far "
        "goes on; median: a variant whose best value is worse than the median of the others' means "
        "ends"
    )
    grace_period: Count = Field(default=1, description="evaluations that every variant gets")
    reduction_factor: Annotated[float, Field(gt=1)] | None = Field(
        default=None, description="of asha; default 4"
    )
    min_samples: Count | None = Field(
        default=None, description="other variants that the median needs; default 3"
    )

    @model_validator(mode="after")
    def _own_keys(self) -> "StopSettings":
        for key, name in (("reduction_factor", "asha"), ("min_samples", "median")):
            if getattr(self, key) is not None and self.name != name:
                raise ValueError(f"`stop.{key}` is a setting of `{name}`, not of `{self.name}`")
        return self


class MixtureSettings(Settings):
    """Weights of the data sets of `job: train`, from small runs with drawn weights."""

    num_tokens: Count | None = Field(
        default=None,
        description="of the training that the weights are for; default those of this job",
    )
    max_epochs: Annotated[float, Field(gt=0)] = Field(
        default=4.0, description="how often that training may see a data set"
    )
    regression: Literal["ridge", "boosted"] = Field(
        default="ridge",
        description="of the metric; ridge: on shares and their products; boosted: trees",
    )
    concentration: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="sum of the Dirichlet distribution's parameters: the smaller, the further from "
        "the natural mixture; default twice the number of data sets",
    )


CURVES = {"train.heldout_nll": "nll", "train.validation_accuracy": "accuracy"}
"""By metrics that are measured while a variant trains: their key in an evaluation."""


class SweepSettings(Settings):
    """Variants of a job: which keys take which values, and what makes a variant the best one."""

    over: dict[str, _Tried] = Field(
        default={}, description="key -> values, or a range; `selection.tau: [4, 8]`"
    )
    mixture: MixtureSettings | None = Field(
        default=None, description="instead of `over`: weights of the data sets of `job: train`"
    )
    search: Literal["grid", "random", "optuna"] = Field(
        default="grid",
        description="grid: every combination; random: drawn by `seed`; optuna: each one after "
        "those before it (extra `sweep`)",
    )
    metric: str = Field(
        description="a number of `run --json`, such as target.color.heldout_nll; held-out losses "
        "are compared on one half of the held-out documents, and reported on the other"
    )
    mode: Literal["min", "max"] = "min"
    max_runs: Count | None = Field(default=None, description="default: all of a grid")
    max_flops: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="of all variants, as `plan` counts them; others are left out"
    )
    seed: int = 0
    stop: StopSettings | None = Field(default=None, description="default: all run to their end")

    @model_validator(mode="after")
    def _fits(self) -> "SweepSettings":
        for key in self.over:
            if key.split(".")[0] in NOT_IDENTITY | {"job", "sweep"}:
                raise ValueError(f"`over.{key}` changes no result: all variants would be the same")
        if bool(self.over) == (self.mixture is not None):
            raise ValueError("give either `over` or `mixture`")
        if self.mixture is not None:
            return self._checked_mixture()
        ranges = [key for key, values in self.over.items() if isinstance(values, SweepRange)]
        if self.search == "grid" and ranges:
            raise ValueError(f"`over.{ranges[0]}` is a range: give values, or `search: random`")
        if self.search != "grid" and self.max_runs is None:
            raise ValueError(f"`max_runs`: `search: {self.search}` needs it")
        return self

    def _checked_mixture(self) -> "SweepSettings":
        if "search" in self.model_fields_set:
            raise ValueError("`search`: the weights of a `mixture` are drawn: leave it out")
        if self.stop is not None:
            raise ValueError("`stop`: a run that is stopped says nothing of its mixture")
        if self.max_runs is None:
            raise ValueError("`max_runs`: `mixture` needs it")
        return self

    @property
    def goes_on(self) -> bool:
        """Whether later variants depend on the results of those before them."""
        return self.search == "optuna" or self.mixture is not None

    def variants(self) -> list[dict[str, Value]]:
        """The variants of a grid, or of a random search: key -> value, each once, in order."""
        made: list[dict[str, Value]] = []
        if self.search == "grid":
            columns = [one for one in self.over.values() if isinstance(one, list)]
            made += [dict(zip(self.over, row, strict=True)) for row in itertools.product(*columns)]
        else:
            draws = np.random.default_rng(self.seed).random((self.max_runs or 0, len(self.over)))
            made += [self.drawn(row.tolist()) for row in draws]
        unique = {repr(sorted(one.items())): one for one in made}
        return [*unique.values()][: self.max_runs]

    def drawn(self, shares: list[float]) -> dict[str, Value]:
        """The variant at a share in [0, 1) of every key."""
        return {
            key: values.at(share)
            if isinstance(values, SweepRange)
            else values[int(share * len(values))]
            for (key, values), share in zip(self.over.items(), shares, strict=True)
        }


class SweepSpec(JobSpec):
    """A job with `sweep`; `of` is its spec without it."""

    job: Literal["sweep"] = "sweep"
    of: SerializeAsAny[JobSpec]
    sweep: SweepSettings

    @field_validator("of", mode="before")
    @classmethod
    def _spec(cls, content: Any) -> Any:
        return (
            content if isinstance(content, JobSpec) else spec_model(content).model_validate(content)
        )

    @model_validator(mode="before")
    @classmethod
    def _of_the_job(cls, content: Any) -> Any:
        """Name, store, options and `compute` are those of the job."""
        if not isinstance(content, dict) or not isinstance(of := content.get("of"), JobSpec):
            return content
        return content | {key: getattr(of, key) for key in NOT_IDENTITY - {"publish"}}

    @model_validator(mode="after")
    def _has_a_mixture(self) -> "SweepSpec":
        if self.sweep.mixture is None:
            return self
        count = len(self.of.datasets) if isinstance(self.of, TrainSpec) else 0
        if count < 2:
            raise ValueError("`sweep.mixture` needs `job: train` with a list of data sets")
        if (self.sweep.max_runs or 0) < count + 5:
            raise ValueError(
                f"`sweep.max_runs: {self.sweep.max_runs}`: {count} data sets need {count + 5} runs "
                "at least, and many more to be sure"
            )
        return self

    @model_validator(mode="after")
    def _has_a_curve(self) -> "SweepSpec":
        stop, metric = self.sweep.stop, self.sweep.metric
        of: Any = self.of
        if stop is None:
            return self
        wanted: dict[type, str] = {
            TrainSpec: "train.heldout_nll",
            ClassifySpec: "train.validation_accuracy",
        }
        own = wanted.get(type(of))
        if own is None or metric != own:
            whose = "" if own is None else f"; with a curve here: {own}"
            raise ValueError(
                f"`sweep.stop` needs a metric with a curve, and `{metric}` of `job: {of.job}` is "
                f"known at the end alone{whose}"
            )
        if isinstance(of, TrainSpec) and of.heldout is None:
            raise ValueError(f"`sweep.stop`: `{metric}` needs `heldout`")
        if "train.eval_points" in self.sweep.over:
            raise ValueError("`sweep.over.train.eval_points`: `sweep.stop` counts evaluations")
        if stop.grace_period >= self.num_evaluations:
            raise ValueError(
                f"`sweep.stop.grace_period: {stop.grace_period}` leaves nothing to stop: training "
                f"has `train.eval_points: {self.num_evaluations}`"
            )
        return self

    @property
    def num_evaluations(self) -> int:
        """Evaluations of a training variant."""
        assert isinstance(self.of, TrainSpec | ClassifySpec)
        return self.of.train.eval_points

    @property
    def num_actors(self) -> int:
        return self.of.num_actors

    def variant(self, values: Mapping[str, Value]) -> dict[str, Any]:
        """The content of a variant's spec; it publishes nothing."""
        content: dict[str, Any] = deepcopy(self.of.model_dump(mode="json", exclude_unset=True))
        content.pop("publish", None)
        for key, value in values.items():
            put_key(content, key, value, f"`sweep.over.{key}`")
        label = ", ".join(f"{key} {value}" for key, value in values.items())
        return content | {"name": f"{self.name or content['job']}: {label}"}

    def to_yaml(self) -> str:
        return self._with_sweep(self.of.to_yaml())

    def to_send(self) -> str:
        return self._with_sweep(self.of.to_send())

    def _with_sweep(self, of: str) -> str:
        sweep = self.sweep.model_dump(mode="json", exclude_unset=True)
        content = yaml.safe_load(of) | {"sweep": sweep}
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def put_key(content: dict[str, Any], key: str, value: Any, what: str) -> None:
    """Set `a.b` in a spec's content; every step but the last is a section, or a place in a list.

    Raises:
        SpecError: it is not; the message begins with `what`.
    """
    *path, last = key.split(".")
    node: Any = content
    for depth, step in enumerate(path):
        if isinstance(node, list) and step.isdigit() and int(step) < len(node):
            node = node[int(step)]
            continue
        node = node.setdefault(step, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict | list):
            raise SpecError(f"{what}: `{'.'.join(path[: depth + 1])}` is not a section")
    if not isinstance(node, dict):
        raise SpecError(f"{what}: `{'.'.join(path)}` is a list")
    node[last] = value
