"""The specs of jobs as pydantic models: unknown keys are refused, every field is described.

A spec is one YAML file. `jobs/spec_file.py` reads it, applies `--set a.b=c` and prints pydantic's
errors in one line each. The other packages get these models.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from stillhouse.compute_settings import ComputeSettings
from stillhouse.data_settings import (
    FROM_SETTING,
    ExcludeSettings,
    PartTokens,
    PathOrSource,
    PoolSource,
    TargetSource,
    TokenizerSettings,
    TokenizerTraining,
    WeightedTarget,
    with_own_tokenizer,
)
from stillhouse.evaluation.settings import TaskEvaluation
from stillhouse.operating_settings import FailureSettings, PriceSettings, TrackSettings
from stillhouse.selection.own_settings import OwnScorerSettings
from stillhouse.settings import (
    Count,
    Settings,
    Share,
    StepName,
    refuse_secret_urls,
    refuse_secrets,
)
from stillhouse.storage.names import NAME_PATTERN

Dtype = Literal["auto", "float32", "bfloat16"]


class ModelSettings(Settings):
    """A fresh causal language model from a transformers configuration."""

    architecture: Literal["llama", "qwen3", "olmo2", "gpt_neox"] = Field(
        default="llama",
        description="llama: pre-norm, rotary positions, gated MLP; read by every engine",
    )
    hidden_size: Count = 128
    num_layers: Count = 2
    num_heads: Count | None = Field(
        default=None, description="default: heads of 64 (32 when narrow)"
    )
    intermediate_size: Count | None = Field(
        default=None, description="default: 8/3 of the width, by 64s"
    )
    tie_embeddings: bool = Field(
        default=True, description="one matrix for input and output embeddings"
    )
    max_position: Count | None = Field(
        default=None, description="context length; default the sequence's"
    )


class Optimisation(Settings):
    """How a model is trained. Defaults follow appendix H of the paper, scaled to small models."""

    learning_rate: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        default="auto", description="auto: by the model's width (guide.md)"
    )
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        default="cosine", description="ends where the tokens end"
    )
    warmup: Share = Field(default=0.05, description="share of the steps")
    final_learning_rate: Share = Field(default=0.1, description="share of the peak at the end")
    global_batch: Count | Literal["auto"] = Field(
        default="auto", description="sequences a step; auto: by the number of tokens (guide.md)"
    )
    micro_batch: Count | None = Field(
        default=None, description="sequences a forward pass; default all"
    )
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    z_loss: Annotated[float, Field(ge=0)] = Field(
        default=1e-4, description="times mean logsumexp squared"
    )
    dtype: Dtype = Field(default="auto", description="of the forward pass; auto: bfloat16 on GPUs")
    compile: Literal["auto", "on", "off"] = Field(default="auto", description="auto: on for GPUs")
    seed: int = 0

    @property
    def peak_rate(self) -> float:
        """The learning rate, after `auto` is resolved (`stillhouse.training.task.choose`)."""
        assert self.learning_rate != "auto"
        return self.learning_rate

    @property
    def batch_size(self) -> int:
        """Sequences a step, after `auto` is resolved."""
        assert self.global_batch != "auto"
        return self.global_batch


class PriorSettings(Optimisation):
    """The prior: trained on a random part of the pool, or given by path."""

    model: ModelSettings | None = None
    path: str | None = Field(default=None, description="a transformers folder, URI or hub name")
    from_: str | None = Field(default=None, alias="from", description=FROM_SETTING)
    num_tokens: Count = Field(default=2_000_000, description="tokens of the pool to train on")
    pin: Literal["first", "refresh"] = Field(
        default="first", description="first: a trained one is kept when shards are added"
    )

    @model_validator(mode="after")
    def _one_of(self) -> "PriorSettings":
        if sum(one is not None for one in (self.model, self.path, self.from_)) > 1:
            raise ValueError("give either `model`, `path` or `from`")
        return self


class ConditionalSettings(Optimisation):
    """The conditional: the prior fine-tuned on the target, or given by path."""

    path: str | None = Field(default=None, description="a transformers folder, URI or hub name")
    from_: str | None = Field(default=None, alias="from", description=FROM_SETTING)
    epochs: Annotated[float, Field(gt=0)] = Field(default=1, description="passes over the target")
    num_tokens: Count | None = Field(default=None, description="instead of epochs")

    @model_validator(mode="after")
    def _one_of(self) -> "ConditionalSettings":
        if self.path is not None and self.from_ is not None:
            raise ValueError("give either `path` or `from`")
        return self


class ScoringSettings(Settings):
    """How the auxiliary models score the pool."""

    dtype: Dtype = Field(
        default="auto", description="auto: bfloat16 on GPUs, exact float32 on CPUs"
    )
    compile: Literal["auto", "on", "off"] = Field(default="auto", description="auto: on for GPUs")
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        default="auto", description="auto: sdpa; on CPUs eager below 256 tokens"
    )
    micro_batch: Count | None = Field(
        default=None,
        description="sequences a forward pass; default: 2,048 tokens on CPUs, 65,536 on GPUs",
    )


class SelectionSettings(Settings):
    """What is kept: exactly one of tau, num_tokens, fraction, min_score, threshold_from."""

    tau: Annotated[float, Field(ge=1.0)] | None = Field(
        default=None,
        description="size of the pool divided by the size of the selection (Algorithm 1)",
    )
    num_tokens: Count | None = None
    fraction: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    min_score: float | None = Field(default=None, description="keep everything from this score up")
    threshold_from: str | None = Field(
        default=None,
        description="use its threshold: URI of a selection, a run (URI or id) or STORE#NAME",
    )
    rule: str | None = Field(
        default=None,
        description="how rows are ranked: `color`, with `scorer` `own`; or yours, `module:Class`",
    )
    grain: Literal["sequences", "documents"] = "sequences"
    text: bool = Field(default=False, description="sequences get a column of their text")
    max_share: Share | dict[str, Share] | None = Field(
        default=None, description="of the selection, for every source or by name"
    )
    min_share: dict[str, Share] | None = Field(
        default=None, description="of the selection, by source"
    )
    exclude_contaminated: bool = Field(
        default=True, description="documents that share word 13-grams with the held-out target"
    )
    exclude_prior_rows: Literal["auto"] | bool = Field(
        default="auto",
        description="rows the prior was trained on; auto: where above 2 % of the pool",
    )
    seed: int = Field(
        default=0, description="of the order of rows in the selection and of the controls"
    )

    @model_validator(mode="after")
    def _one_of(self) -> "SelectionSettings":
        rules = [self.tau, self.num_tokens, self.fraction, self.min_score, self.threshold_from]
        if sum(rule is not None for rule in rules) != 1:
            raise ValueError(
                "give exactly one of `tau`, `num_tokens`, `fraction`, `min_score`, `threshold_from`"
            )
        if self.max_share is not None or self.min_share is not None:
            if self.min_score is not None or self.threshold_from is not None:
                raise ValueError("shares need a size: `tau`, `num_tokens` or `fraction`")
            if self.grain == "documents":
                raise ValueError("shares are of sequences: use `grain: sequences` with them")
            if sum((self.min_share or {}).values()) > 1:
                raise ValueError("the shares of `min_share` add up to more than 1")
        return self


class TrainSettings(Optimisation):
    """The target model, trained on the selection and, to compare, on each control."""

    model: ModelSettings = Field(default=ModelSettings(), description="the target's architecture")
    num_tokens: Count | None = Field(
        default=None, description="default: one pass over the selection"
    )
    controls: list[str] = Field(
        default=[],
        description="selections of equal size by other rules: `random`, `conditional_only`, "
        "`dsir`, `rho_down`, or your own, `module:Class`",
    )
    seeds: list[int] | None = Field(
        default=None, description="one training each; default: `seed` alone"
    )
    eval_points: Count = Field(
        default=10, description="evaluations over the run, the last at the end"
    )

    @property
    def all_seeds(self) -> list[int]:
        return self.seeds if self.seeds else [self.seed]


class JobSpec(Settings):
    """The keys of every job's spec, which are not part of the identity of its results."""

    name: str | None = Field(default=None, description="shown in report and status")
    store: str = Field(
        default="./store", description="folder or fsspec URI that everything goes under"
    )
    storage_options: dict[str, Any] = Field(
        default={}, description="for fsspec (endpoint_url, profile, ...); never a secret"
    )
    publish: str | None = Field(
        default=None,
        pattern=NAME_PATTERN,
        description="name of the newest result of this spec: `open_selection('STORE#name')`",
    )
    on_failure: FailureSettings | None = Field(
        default=None, description="a message when `run` ends with an error or is killed"
    )
    track: TrackSettings | None = Field(
        default=None, description="losses, rewards and costs also go to these"
    )
    prices: PriceSettings | None = Field(
        default=None, description="plan and report then have what steps cost"
    )
    compute: ComputeSettings = ComputeSettings()

    @property
    def num_actors(self) -> int:
        """Workers that run at once."""
        return max(self.compute.scorers, self.compute.trainers)

    @property
    def extra_modules(self) -> tuple[str, ...]:
        """Modules of optional extras that the job needs."""
        return ()

    def to_yaml(self) -> str:
        """The resolved spec, defaults included."""
        return _yaml(self.model_dump(mode="json"))

    def to_send(self) -> str:
        """The spec as written, without the address of the cluster that it is sent to."""
        content = self.model_dump(mode="json", exclude_unset=True)
        compute = content.pop("compute", {})
        compute.pop("address", None)
        return _yaml(content | ({"compute": compute} if compute else {}))

    @field_validator("storage_options")
    @classmethod
    def _no_secrets(cls, options: dict[str, Any]) -> dict[str, Any]:
        refuse_secrets(options)
        return options

    @model_validator(mode="before")
    @classmethod
    def _no_secret_urls(cls, content: Any) -> Any:
        refuse_secret_urls(content, "")
        return content


def _yaml(content: dict[str, Any]) -> str:
    """With the kind of job first."""
    import yaml

    return yaml.safe_dump({"job": content["job"]} | content, sort_keys=False, allow_unicode=True)


NOT_IDENTITY = set(JobSpec.model_fields)
"""Keys of a spec that do not change its results."""


class EvaluatedSpec(JobSpec):
    """A job that trains language models, which can be measured on tasks."""

    evaluate: TaskEvaluation | None = Field(
        default=None, description="tasks that the trained models are measured on (evaluation.md)"
    )

    @property
    def extra_modules(self) -> tuple[str, ...]:
        return ("lm_eval",) if self.evaluate else ()


class SelectSpec(EvaluatedSpec):
    """`job: select`: score a pool with two models, keep what the target gains most from."""

    job: Literal["select"]
    pool: PoolSource
    target: TargetSource | None = None
    targets: dict[StepName, WeightedTarget] = Field(
        default={},
        description="instead of `target`: several domains by name; with a `weight` each, one "
        "selection for their mixture, else a selection for each (guide.md)",
    )
    tokenizer: TokenizerSettings = Field(
        default=TokenizerSettings(train=TokenizerTraining()),
        description="default: that of the models given by path, else one trained on the pool",
    )
    sequence_length: Annotated[int, Field(ge=8)] = 256
    part_tokens: PartTokens = Field(
        default="auto",
        description="tokens a part, the unit of work and retry; auto: 64 parts (guide.md)",
    )
    deduplicate: bool = Field(default=True, description="drop exact duplicates after normalising")
    exclude: ExcludeSettings | None = Field(
        default=None, description="documents to take down (guide.md)"
    )
    decontaminate: list[PathOrSource] = Field(
        default=[],
        description="benchmarks: nothing is kept that shares word 13-grams with them (guide.md)",
    )
    prior: PriorSettings = PriorSettings()
    conditional: ConditionalSettings = ConditionalSettings()
    scorer: OwnScorerSettings | None = Field(
        default=None,
        description="your own scorer instead of `prior` and `conditional`",
    )
    scoring: ScoringSettings = ScoringSettings()
    selection: SelectionSettings
    train: TrainSettings | None = None

    @model_validator(mode="before")
    @classmethod
    def _models_tokenizer(cls, content: Any) -> Any:
        return with_own_tokenizer(content, ("prior", "conditional"))

    @field_validator("tokenizer", mode="before")
    @classmethod
    def _tokenizer_name(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @field_validator("scorer", mode="before")
    @classmethod
    def _scorer_name(cls, value: Any) -> Any:
        return {"import": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_scorer(self) -> "SelectSpec":
        given = self.prior != PriorSettings() or self.conditional != ConditionalSettings()
        if self.scorer is not None and given:
            raise ValueError("give either `scorer`, or `prior` and `conditional`")
        if bool(self.targets) == (self.target is not None):
            raise ValueError("give either `target` or `targets`")
        if self.evaluate is not None and self.train is None:
            raise ValueError("`evaluate` measures the models of `train`, which is not there")
        if self.evaluate is not None and self.evaluate.checkpoints:
            raise ValueError("`evaluate.checkpoints` is for `job: train`: targets keep none")
        return self

    @property
    def domains(self) -> dict[str, TargetSource]:
        """The target's domains by their keys in the spec."""
        if self.target is not None:
            return {"target": self.target}
        return {
            f"targets.{name}": one if one.source else one.model_copy(update={"source": name})
            for name, one in self.targets.items()
        }

    @property
    def rule(self) -> str:
        """The rule of the selection; controls have other rules."""
        return self.selection.rule or ("color" if self.scorer is None else "own")
