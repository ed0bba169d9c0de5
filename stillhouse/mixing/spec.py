"""The spec of `job: mix`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, field_validator, model_validator

from stillhouse.errors import SpecError
from stillhouse.mixing.doremi import DoReMi
from stillhouse.mixing.loss_scaling import LossScaling
from stillhouse.mixing.policy import NamedPolicy, Policy, StepPlan
from stillhouse.mixing.replay import Replay
from stillhouse.mixing.static import Static, TargetOnly, Uniform
from stillhouse.mixing.ucb1 import Ucb1
from stillhouse.settings import without_removed
from stillhouse.spec import (
    Count,
    Dtype,
    JobSpec,
    ModelSettings,
    Optimisation,
    Settings,
    Share,
    TokenizerSettings,
    TokenizerTraining,
)
from stillhouse.tokenizer_settings import FROM_SETTING, with_own_tokenizer

Control: TypeAlias = Literal[
    "target_only",
    "uniform",
    "uniform_with_target_pass",
    "static_alignment",
    "loss_scaling",
]
_SOFTMAX = 0.1


class ArmSource(Settings):
    """Auxiliary data: one arm, or with `by` one for each value of a column."""

    name: str | None = Field(default=None, description="of the arm; default: of its file or folder")
    path: str | list[str] | None = Field(
        default=None, description="files, folders, globs or URIs of task rows or texts"
    )
    selection: str | None = Field(
        default=None,
        description="instead: the run (URI) that made a selection, STORE#NAME, or the selection's "
        "URI or fingerprint; `from` is the same",
    )
    where: dict[str, str] = Field(default={}, description="only rows with these values, by column")
    by: str | None = Field(default=None, description="column whose values are arms of their own")
    exclude: list[str] = Field(default=[], description="with `by`: values that are no arms")

    @model_validator(mode="before")
    @classmethod
    def _from(cls, content: Any) -> Any:
        if not isinstance(content, dict) or "from" not in content:
            return content
        if "selection" in content:
            raise ValueError("give either `from` or `selection`: they are the same")
        return {"selection" if key == "from" else key: value for key, value in content.items()}

    @model_validator(mode="after")
    def _one_of(self) -> "ArmSource":
        if (self.path is None) == (self.selection is None):
            raise ValueError("give either `path` or `selection`")
        if self.selection is not None and (self.by is not None or self.where):
            raise ValueError("`by` and `where` are for `path`, a selection is one arm")
        if self.by is not None and self.name is not None:
            raise ValueError("with `by` the column's values are the names: drop `name`")
        return self

    @property
    def paths(self) -> list[str]:
        """Of files; none of a selection."""
        return [self.path] if isinstance(self.path, str) else self.path or []


class TargetTask(Settings):
    """The few-shot target. Rows whose column `split` is `test` are for measuring only."""

    path: str | list[str] = Field(description="files, folders, globs or URIs of task rows")
    where: dict[str, str] = Field(default={}, description="only rows with these values, by column")
    num_shots: Annotated[int, Field(ge=2)] = Field(
        default=32, description="half train, half decide when to stop; published: 20 to 70"
    )


class MixModel(ModelSettings):
    """The model that is trained: a fresh one, or one from a path."""

    kind: Literal["encoder_decoder", "decoder"] = Field(
        default="encoder_decoder", description="encoder_decoder: T5, as published"
    )
    path: str | None = Field(
        default=None, description="a transformers folder, URI or hub name; sizes are its own then"
    )
    from_: str | None = Field(default=None, alias="from", description=FROM_SETTING)
    tie_embeddings: bool = Field(
        default=False, description="one matrix for input and output; rewards look at the output's"
    )


class MixTraining(Settings):
    """How the target model is trained."""

    num_steps: Count = Field(default=10_000, description="at most; published: 10,000")
    micro_batch: Count = Field(default=8, description="rows of a micro-batch, all of one arm")
    accumulation: Count = Field(
        default=16, description="auxiliary micro-batches a step; published: 16 for 3B models"
    )
    optimizer: Literal["adafactor", "adamw"] = Field(
        default="adafactor", description="adafactor: as published, without a first moment"
    )
    learning_rate: Annotated[float, Field(gt=0)] = Field(
        default=1e-4, description="as published for pre-trained models; fresh small ones want 1e-3"
    )
    schedule: Literal["constant", "cosine", "wsd"] = "constant"
    warmup: Share = Field(default=0.01, description="share of the steps")
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    dtype: Dtype = Field(default="auto", description="of the forward pass; auto: bfloat16 on GPUs")
    activation_checkpointing: bool = Field(
        default=False, description="less memory for a third more work"
    )
    evaluate_every: Count = Field(
        default=100, description="steps between measurements, which are also the checkpoints"
    )
    patience: Count | None = Field(
        default=10, description="measurements without a better one that end a run"
    )

    def optimisation(self, seed: int) -> Optimisation:
        """The settings in the form that trainers read."""
        shared = {*MixTraining.model_fields} & {*Optimisation.model_fields}
        return Optimisation(**self.model_dump(include=shared), betas=(0.9, 0.999), seed=seed)


class MixSpec(JobSpec):
    """`job: mix`: a bandit chooses the auxiliary data while the target model trains."""

    job: Literal["mix"]
    target: TargetTask
    auxiliary: ArmSource | list[ArmSource]
    tokenizer: TokenizerSettings = Field(
        default=TokenizerSettings(train=TokenizerTraining()),
        description="default: that of a model given by path, else one trained on the rows",
    )
    max_input_tokens: Count = Field(default=512, description="longer inputs are cut, and counted")
    max_target_tokens: Count = Field(default=128, description="longer targets are cut, and counted")
    max_examples: Count | None = Field(
        default=10_000, description="of each arm, the first ones, as published; null for all"
    )
    skip_bad_arms: bool = Field(
        default=False, description="go on without arms that are empty or cannot be read"
    )
    model: MixModel = MixModel()
    policy: NamedPolicy = Ucb1(name="ucb1")
    train: MixTraining = MixTraining()
    controls: list[Control] = Field(
        default=[], description="runs of as many gradient passes under other rules"
    )
    seeds: list[int] = Field(
        default=[0], min_length=1, description="each draws its own shots, order and weights"
    )
    log_every: Count = Field(
        default=10, description="steps between two that log the whole distribution"
    )

    @model_validator(mode="before")
    @classmethod
    def _as_given(cls, content: Any) -> Any:
        content = without_removed(
            content, "arms", ("same", "fresh"), "a job with other arms trains from the beginning"
        )
        return with_own_tokenizer(content, ("model",))

    @field_validator("tokenizer", mode="before")
    @classmethod
    def _tokenizer_name(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fits(self) -> "MixSpec":
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"`seeds` {self.seeds} hold one twice")
        if len(set(self.controls)) < len(self.controls):
            raise ValueError(f"`controls` {self.controls} hold one twice")
        policy = self.policy
        if isinstance(policy, DoReMi) and (policy.path is None) == (policy.from_ is None):
            raise ValueError(
                "give either `policy.path` or `policy.from`: DoReMi compares with a reference "
                "model, such as that of a run with `policy: {name: static, size_temperature: 0}`"
            )
        if self.model.path is not None and self.model.from_ is not None:
            raise ValueError("`model`: give either `path` or `from`")
        if self.policy.label in self.controls:
            raise ValueError(f"`{self.policy.label}` is the policy and among the `controls`")
        if not isinstance(self.policy, Replay):  # the passes of a replay are in its log
            try:
                rules_of(self, [])
            except SpecError as error:
                raise ValueError(str(error)) from None
        return self

    @property
    def reference(self) -> str | None:
        """The path of DoReMi's reference model."""
        return self.policy.path if isinstance(self.policy, DoReMi) else None

    @property
    def given_paths(self) -> dict[str, str]:
        """The models that are given by path, by their keys."""
        paths = {"model": self.model.path, "policy": self.reference}
        return {key: path for key, path in paths.items() if path is not None}

    @property
    def sources(self) -> list[ArmSource]:
        """The sources of arms as a list."""
        return self.auxiliary if isinstance(self.auxiliary, list) else [self.auxiliary]

    @property
    def target_batches(self) -> int:
        """M: micro-batches of a target pass."""
        return -(-((self.target.num_shots + 1) // 2) // self.train.micro_batch)


def control_policy(name: Control, policy: Policy) -> Policy:
    """A control as a policy; it compares the gradients that `policy` does, where it compares."""
    asked = policy.model_dump(include={"parameters", "initial_examples"})
    match name:
        case "target_only":
            return TargetOnly(name="target_only")
        case "uniform":
            return Uniform(name="uniform")
        case "uniform_with_target_pass":
            return Uniform(name="uniform", target_pass=True)
        case "static_alignment":
            return Static(name="static", alignment_temperature=_SOFTMAX, target_pass=True, **asked)
        case "loss_scaling":
            return LossScaling(name="loss_scaling", **asked)


@dataclass(frozen=True, slots=True)
class Rule:
    """A policy or control of a job, and how many micro-batches and steps it has.

    Attributes:
        label: what people call it.
        slots: auxiliary micro-batches a step.
    """

    label: str
    policy: Policy
    plan: StepPlan
    slots: int
    num_steps: int


def rules_of(spec: MixSpec, sizes: Sequence[int]) -> list[Rule]:
    """The policy, and its controls with as many gradient passes.

    A control has the policy's passes in every step, and as many steps more as the policy's initial
    pass over arms of these sizes would have made.

    Raises:
        SpecError: a control would draw nothing.
    """
    train, batches = spec.train, spec.target_batches
    plan, slots = spec.policy.plan(batches), train.accumulation
    rules = [Rule(spec.policy.label, spec.policy, plan, slots, train.num_steps)]
    each = plan.passes(slots)
    budget = each * train.num_steps + _initial_passes(spec, spec.policy, sizes)
    for name in spec.controls:
        policy = control_policy(name, spec.policy)
        plan = policy.plan(batches)
        steps = max(1, (budget - _initial_passes(spec, policy, sizes)) // each)
        if not policy.draws_arms:
            rules.append(Rule(name, policy, StepPlan(each), 0, steps))
            continue
        slots = each - plan.passes(0)
        if slots <= 0:
            raise SpecError(
                f"the control `{name}` has {plan.passes(0)} gradient passes of the target in every "
                f"step, and a step of `{spec.policy.label}` has {each} in all: raise "
                "`train.accumulation`, lower `target.num_shots`, or leave it out of `controls`"
            )
        rules.append(Rule(name, policy, plan, slots, steps))
    return rules


def _initial_passes(spec: MixSpec, policy: Policy, sizes: Sequence[int]) -> int:
    if not policy.first_examples:
        return 0
    batches = (-(-min(policy.first_examples, n) // spec.train.micro_batch) for n in sizes)
    return sum(batches) + spec.target_batches
