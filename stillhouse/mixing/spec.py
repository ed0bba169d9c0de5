"""`job: mix`: its settings, and the runs that it makes (without torch)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, field_validator, model_validator

from stillhouse.data_settings import FROM_SETTING, FileFormat, with_own_tokenizer
from stillhouse.errors import SpecError
from stillhouse.mixing.arms import ArmPart
from stillhouse.mixing.decisions import Replay
from stillhouse.mixing.doremi import DoReMi
from stillhouse.mixing.flad import LossScaling, Ucb1
from stillhouse.mixing.policy import NamedPolicy, Policy, StepPlan
from stillhouse.mixing.static import Static, TargetOnly, Uniform
from stillhouse.settings import OneOrMore, without_removed
from stillhouse.spec import (
    Count,
    Dtype,
    EvaluatedSpec,
    ModelSettings,
    Optimisation,
    Settings,
    Share,
    TokenizerSettings,
    TokenizerTraining,
)
from stillhouse.storage.task import Place, Task

Control: TypeAlias = Literal[
    "target_only",
    "uniform",
    "uniform_with_target_pass",
    "static_alignment",
    "loss_scaling",
]
_STATIC_TEMPERATURE = 0.1


class ArmSource(FileFormat):
    """Auxiliary data: one arm, or with `by` one for each value of a column."""

    name: str | None = Field(
        default=None, description="of the arm; default: the file's or folder's"
    )
    path: OneOrMore[str] | None = Field(
        default=None, description="files, folders, globs or URIs of task rows or texts"
    )
    selection: str | None = Field(
        default=None,
        description="instead of `path`: the run (URI) that made a selection, STORE#NAME, or the "
        "selection's URI or fingerprint; `from` means the same",
    )
    where: dict[str, str] = Field(default={}, description="only rows with these values, by column")
    by: str | None = Field(default=None, description="column: each of its values becomes an arm")
    exclude: list[str] = Field(default=[], description="with `by`: values to leave out")

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
        if self.selection is not None and self.format != "auto":
            raise ValueError("`format` is for `path`: a selection is Parquet")
        if self.by is not None and self.name is not None:
            raise ValueError("with `by` the column's values are the names: drop `name`")
        return self

    @property
    def paths(self) -> list[str]:
        return [self.path] if isinstance(self.path, str) else self.path or []


class TargetTask(FileFormat):
    """The few-shot target. Rows whose column `split` is `test` are for measuring only."""

    path: OneOrMore[str] = Field(description="files, folders, globs or URIs of task rows")
    where: dict[str, str] = Field(default={}, description="only rows with these values, by column")
    num_shots: Annotated[int, Field(ge=2)] = Field(
        default=32,
        description="half for training, half to decide when to stop; published: 20 to 70",
    )


class MixModel(ModelSettings):
    """The model that is trained: a fresh one, or one from a path."""

    kind: Literal["encoder_decoder", "decoder"] = Field(
        default="encoder_decoder", description="encoder_decoder: T5, as published"
    )
    path: str | None = Field(
        default=None, description="a transformers folder, URI or hub name, which has its own sizes"
    )
    from_: str | None = Field(default=None, alias="from", description=FROM_SETTING)
    tie_embeddings: bool = Field(
        default=False, description="one matrix for input and output embeddings"
    )


class MixTraining(Settings):
    """How the target model is trained."""

    num_steps: Count = Field(default=10_000, description="maximum; published: 10,000")
    micro_batch: Count = Field(default=8, description="rows of a micro-batch, all of one arm")
    accumulation: Count = Field(
        default=16, description="auxiliary micro-batches a step; published: 16 for 3B models"
    )
    optimizer: Literal["adafactor", "adamw"] = Field(
        default="adafactor", description="adafactor: as published, without a first moment"
    )
    learning_rate: Annotated[float, Field(gt=0)] = Field(
        default=1e-4, description="as published for pretrained models; 1e-3 suits small fresh ones"
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
        default=100, description="steps between evaluations, which are also the checkpoints"
    )
    patience: Count | None = Field(
        default=10, description="stop after so many evaluations without improvement; null: never"
    )

    def optimisation(self, seed: int) -> Optimisation:
        """The same settings as the optimisers take them."""
        shared = {*MixTraining.model_fields} & {*Optimisation.model_fields}
        return Optimisation(**self.model_dump(include=shared), betas=(0.9, 0.999), seed=seed)


class MixSpec(EvaluatedSpec):
    """`job: mix`: a bandit chooses the auxiliary data while the target model trains."""

    job: Literal["mix"]
    target: TargetTask
    auxiliary: OneOrMore[ArmSource]
    tokenizer: TokenizerSettings = Field(
        default=TokenizerSettings(train=TokenizerTraining()),
        description="default: that of a pretrained model, or one trained on the rows",
    )
    max_input_tokens: Count = Field(default=512, description="longer inputs are cut, and counted")
    max_target_tokens: Count = Field(default=128, description="longer targets are cut, and counted")
    max_examples: Count | None = Field(
        default=10_000, description="the first rows of each arm, as published; null for all"
    )
    skip_bad_arms: bool = Field(
        default=False, description="leave out arms that are empty or cannot be read"
    )
    model: MixModel = MixModel()
    policy: NamedPolicy = Ucb1(name="ucb1")
    train: MixTraining = MixTraining()
    controls: list[Control] = Field(
        default=[], description="baselines: other rules with as many gradient passes"
    )
    seeds: list[int] = Field(
        default=[0], min_length=1, description="each has its own shots, order and initial weights"
    )
    log_every: Count = Field(default=10, description="steps between logs of the whole distribution")

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
        for key, values in (("seeds", self.seeds), ("controls", self.controls)):
            if len({*values}) < len(values):
                raise ValueError(f"`{key}` {values} hold one twice")
        policy = self.policy
        if isinstance(policy, DoReMi) and (policy.path is None) == (policy.from_ is None):
            raise ValueError(
                "give either `policy.path` or `policy.from`: DoReMi compares with a reference "
                "model, such as that of a run with `policy: {name: static, size_temperature: 0}`"
            )
        if self.model.path is not None and self.model.from_ is not None:
            raise ValueError("`model`: give either `path` or `from`")
        if self.evaluate is not None and self.evaluate.checkpoints:
            raise ValueError("`evaluate.checkpoints` is for `job: train`")
        if policy.label in self.controls:
            raise ValueError(f"`{policy.label}` is the policy and among the `controls`")
        if not isinstance(policy, Replay):  # a replay's passes are known from its log alone
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
        """Paths of the pretrained models, by the section that names them."""
        paths = {"model": self.model.path, "policy": self.reference}
        return {key: path for key, path in paths.items() if path is not None}

    @property
    def sources(self) -> list[ArmSource]:
        return self.auxiliary if isinstance(self.auxiliary, list) else [self.auxiliary]

    @property
    def target_batches(self) -> int:
        """Micro-batches of one pass over the target's training half (M)."""
        return -(-((self.target.num_shots + 1) // 2) // self.train.micro_batch)


def control_policy(name: Control, policy: Policy) -> Policy:
    """A control as a policy; where it compares gradients, the same ones as `policy`."""
    compared = policy.model_dump(include={"parameters", "initial_examples"})
    match name:
        case "target_only":
            return TargetOnly(name="target_only")
        case "uniform":
            return Uniform(name="uniform")
        case "uniform_with_target_pass":
            return Uniform(name="uniform", target_pass=True)
        case "static_alignment":
            temperature = {"alignment_temperature": _STATIC_TEMPERATURE, "target_pass": True}
            return Static(name="static", **temperature, **compared)
        case "loss_scaling":
            return LossScaling(name="loss_scaling", **compared)


@dataclass(frozen=True, slots=True)
class Rule:
    """The policy or a control of a job, and the number and size of its steps.

    Attributes:
        label: its name in results.
        slots: auxiliary micro-batches a step.
    """

    label: str
    policy: Policy
    plan: StepPlan
    slots: int
    num_steps: int

    def identity(self) -> list[int]:
        """Its steps; the policy's identity depends on the seed (`MixTask.decided_by`)."""
        return [self.slots, self.num_steps, self.plan.target_batches]


def rules_of(spec: MixSpec, sizes: Sequence[int]) -> list[Rule]:
    """The policy and its controls, which get as many gradient passes.

    Each step of a control has as many passes as one of the policy's, and there are as many more
    steps as the policy's initial pass over arms of these sizes would have made.

    Raises:
        SpecError: a control's steps would have no room for a draw.
    """
    train, batches = spec.train, spec.target_batches

    def initial_passes(policy: Policy) -> int:
        examples = policy.first_examples
        passes = sum(-(-min(examples, size) // train.micro_batch) for size in sizes)
        return passes + batches if examples else 0

    plan, slots = spec.policy.plan(batches), train.accumulation
    rules = [Rule(spec.policy.label, spec.policy, plan, slots, train.num_steps)]
    each = plan.passes(slots)
    budget = each * train.num_steps + initial_passes(spec.policy)
    for name in spec.controls:
        policy = control_policy(name, spec.policy)
        plan = policy.plan(batches)
        steps = max(1, (budget - initial_passes(policy)) // each)
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


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A pretrained model: a digest of its content, and its folder in the store."""

    digest: str
    folder: Place[str]


@dataclass(frozen=True)
class MixTask(Task):
    """One run: a rule and a seed. Makes the model artifact that its fingerprint names.

    Attributes:
        decided_by: what identifies the rule's policy (`Policy.identity`).
        model: sizes of a fresh one; its kind alone where `init` is given.
        init: the model to start from; None for a fresh one.
        reference: DoReMi's reference model.
        target: path of the target's part in the store.
        tokenizer: its folder.
        max_input, max_target: maximal lengths in tokens, without EOS.
        log: URI of the folder of the decisions.
        log_every: steps between logs of the whole distribution.
    """

    KIND = "models"
    VERSION = 7

    rule: Rule
    seed: int
    decided_by: dict[str, Any]
    model: MixModel
    init: StoredModel | None
    reference: StoredModel | None
    arms: tuple[ArmPart, ...]
    target: str
    num_shots: int
    tokenizer: Place[str]
    tokenizer_digest: str
    eos_token: str
    bos_id: int | None
    max_input: int
    max_target: int
    train: MixTraining
    log: Place[str]
    log_every: Place[int]

    @property
    def encoder_decoder(self) -> bool:
        return self.model.kind == "encoder_decoder"

    @property
    def regime(self) -> dict[str, Any]:
        """What a replay needs beside the draws, as JSON values."""
        return {
            "policy": self.rule.label,
            "seed": self.seed,
            "slots": self.rule.slots,
            "micro_batch": self.train.micro_batch,
            "target_batches": self.rule.plan.target_batches,
            "weighted": self.rule.policy.weights_losses,
        }
