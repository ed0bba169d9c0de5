"""The spec of `job: chain`: jobs under names, which stand for their results in other jobs."""

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import yaml
from pydantic import Field, SerializeAsAny, field_validator, model_validator

from stillhouse.jobs.kinds import Spec, spec_model
from stillhouse.jobs.sweep_spec import SweepSpec
from stillhouse.named_inputs import with_names
from stillhouse.settings import StepName
from stillhouse.spec import ComputeSettings, JobSpec

INHERITED = ("store", "storage_options", "on_failure", "track", "prices")
"""Keys that only the chain has."""


class ChainSpec(JobSpec):
    """`job: chain`: jobs that run after those whose results they use."""

    job: Literal["chain"]
    steps: dict[StepName, SerializeAsAny[JobSpec]] = Field(
        min_length=1,
        description="a whole spec under each name; `{from: NAME}` in another one is its result. "
        "Store and `storage_options` are the chain's; `compute` overrides single keys",
    )

    @field_validator("steps", mode="before")
    @classmethod
    def _specs(cls, steps: Any) -> Any:
        if not isinstance(steps, Mapping):
            return steps
        return {name: _step_spec(name, content) for name, content in steps.items()}

    @model_validator(mode="after")
    def _no_name(self) -> "ChainSpec":
        if self.publish is not None:
            raise ValueError("`publish`: a chain has several results: give it in a step")
        return self

    def step(self, name: str, runs: Mapping[str, str]) -> Spec | SweepSpec:
        """The whole spec of a step; `runs` are the URIs of those that it may name."""
        own: Any = self.steps[name]
        compute = self.compute.model_dump(exclude_unset=True)
        compute |= own.compute.model_dump(exclude_unset=True)
        inherited = {key: getattr(self, key) for key in INHERITED}
        inherited |= {"compute": ComputeSettings.model_validate(compute), "name": own.name or name}
        if isinstance(own, SweepSpec):
            inherited["of"] = own.of.model_copy(update=inherited)
        return with_names(own.model_copy(update=inherited), runs)

    @property
    def num_actors(self) -> int:
        return max(self.step(name, {}).num_actors for name in self.steps)

    def to_yaml(self) -> str:
        steps = {name: yaml.safe_load(step.to_yaml()) for name, step in self.steps.items()}
        for name, step in self.steps.items():
            given = step.compute.model_dump(mode="json", exclude_unset=True)
            steps[name] = {key: v for key, v in steps[name].items() if key not in INHERITED}
            steps[name]["compute"] = given
        return self._yaml(self.model_dump(mode="json", exclude={"publish", "steps"}), steps)

    def to_send(self) -> str:
        content = self.model_dump(mode="json", exclude={"steps"}, exclude_unset=True)
        content.get("compute", {}).pop("address", None)
        steps = {name: yaml.safe_load(step.to_send()) for name, step in self.steps.items()}
        return self._yaml(content, steps)

    def _yaml(self, content: dict[str, Any], steps: dict[str, Any]) -> str:
        whole = {"job": "chain"} | content | {"steps": steps}
        return yaml.safe_dump(whole, sort_keys=False, allow_unicode=True)


AnySpec: TypeAlias = Spec | SweepSpec | ChainSpec


def _step_spec(name: str, content: Any) -> JobSpec:
    """A step from its content.

    Raises:
        ValueError: no job, a chain, or keys that only the chain has. ValidationError: a spec that
            is wrong otherwise.
    """
    if isinstance(content, JobSpec):
        return content
    check_step(name, content)
    if "sweep" in content:
        of = {key: value for key, value in content.items() if key != "sweep"}
        return SweepSpec.model_validate({"of": _step_spec(name, of), "sweep": content["sweep"]})
    return spec_model(content).model_validate(content)


def check_step(name: str, content: Any) -> None:
    """Check what is not a matter of the step's own job.

    Raises:
        ValueError: as `_step_spec`.
    """
    if not isinstance(content, Mapping) or "job" not in content:
        raise ValueError(f"`steps.{name}`: a step is a spec that starts with `job:`")
    if content["job"] == "chain":
        raise ValueError(f"`steps.{name}`: a chain in a chain: write its steps into this one")
    compute = content.get("compute")
    of_all = [key for key in INHERITED if key in content]
    of_all += ["compute.address"] if isinstance(compute, dict) and "address" in compute else []
    if of_all:
        raise ValueError(f"`steps.{name}.{of_all[0]}`: all steps have that of the chain")
