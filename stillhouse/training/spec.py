"""The spec of `job: train`."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from stillhouse.compute_settings import device_type, group_backend
from stillhouse.data_settings import FROM_SETTING, PartTokens, TokenizerSettings
from stillhouse.errors import SpecError
from stillhouse.settings import OneOrMore
from stillhouse.spec import (
    Count,
    EvaluatedSpec,
    ModelSettings,
    Optimisation,
    ScoringSettings,
    Settings,
)
from stillhouse.storage.task import identity
from stillhouse.training.data_spec import (
    FileData,
    SelectionData,
    TrainingData,
    Weight,
    check_heldout,
    check_mixture,
)
from stillhouse.training.named_objective import NamedObjective
from stillhouse.training.signals import Sampling, SignalSettings


class GivenModel(Settings):
    """A language model that exists."""

    path: str | None = Field(default=None, description="a transformers folder, URI or hub name")
    from_: str | None = Field(default=None, alias="from", description=FROM_SETTING)

    @model_validator(mode="after")
    def _one_of(self) -> "GivenModel":
        if (self.path is None) == (self.from_ is None):
            raise ValueError("give either `path` or `from`")
        return self


class InitSettings(GivenModel):
    """The model that a training starts from, instead of a fresh one."""

    optimizer: Literal["fresh", "keep"] = Field(
        default="fresh",
        description="keep: its moments, of a model that `job: train` made in this store",
    )


class LoraSettings(Settings):
    """Low-rank adapters that are trained instead of the model's own weights."""

    rank: Count = Field(default=16, description="columns and rows of the two factors")
    alpha: Count = Field(default=32, description="what they add is scaled by alpha / rank")
    targets: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = Field(
        default="all-linear",
        description="names of linear layers such as `q_proj`; all-linear: all but the head",
    )
    save: Literal["merged", "adapter"] = Field(
        default="merged",
        description="merged: a whole model; adapter: the factors alone, which `peft` reads",
    )


class OnlineSettings(Settings):
    """Scorers ahead of the trainer: of tau x batch candidates the best make the batch."""

    prior: GivenModel
    conditional: GivenModel
    tau: Annotated[float, Field(gt=1.0)] = Field(
        description="candidates scored for each sequence trained on"
    )
    scoring: ScoringSettings = ScoringSettings()


_HERE = "stillhouse.training.objectives"
OBJECTIVES = {
    "cross_entropy": f"{_HERE}.cross_entropy:CrossEntropy",
    "distil": f"{_HERE}.distil:Distil",
    "distiller": f"{_HERE}.distiller:Distiller",
    "self_distillation": f"{_HERE}.self_distillation:SelfDistillation",
    "autodistil": f"{_HERE}.autodistil:AutoDistil",
    "dhkd": f"{_HERE}.dual_head:DualHead",
    "masked_tokens": f"{_HERE}.masked_tokens:MaskedTokens",
}
"""The classes of built-in objectives, by short name."""
WITH_ONE_MODEL = ("distiller", "self_distillation", "autodistil", "dhkd")
"""Built-in objectives with `needs_models`, of one teacher each."""
OF_MASKED = ("masked_tokens", "self_distillation")
"""Built-in objectives of masked language models, the second of causal ones too."""
_OPTIONS = {"cross_entropy": "z_loss", "masked_tokens": "rate"}
"""Objectives without a teacher, and the one setting that each has."""


class TeacherModel(GivenModel):
    """A language model to learn from; it has the student's tokenizer."""

    weight: Weight = Field(default=1.0, description="relative to the other teachers'")


class ObjectiveSettings(NamedObjective, Settings):
    """What training minimises; all other keys are settings of the class."""

    BUILT_IN: ClassVar[Mapping[str, str]] = OBJECTIVES

    model_config = ConfigDict(extra="allow")

    name: str = Field(
        default="cross_entropy",
        description=f"one of {', '.join(OBJECTIVES)}; or your own class: `package.module:Class`",
    )

    teachers: list[TeacherModel] = Field(
        default=[], description="of objectives that learn from models, such as `distil`"
    )
    signals: Literal["stored", "live", "none"] = Field(
        default="stored",
        description="stored: teachers score the data once, before the training; live: ahead of it, "
        "each time the data are read; none: they run in the training workers, for objectives "
        "that need the models themselves: "
        f"{', '.join(WITH_ONE_MODEL)}, and your own with `needs_models`",
    )
    top_k: Count = Field(
        default=32, description="tokens kept of a teacher's distribution, at 6 bytes each"
    )
    sampling: Sampling = Field(
        default="top", description="top: the likeliest; importance: drawn, unbiased on average"
    )
    temperatures: list[Annotated[float, Field(gt=0)]] = Field(
        default=[1.0],
        min_length=1,
        description="at which signals can be read; the objective's `temperature` is one of them",
    )

    @property
    def runs_teachers(self) -> bool:
        """Whether teachers run in the training workers, without signals."""
        return bool(self.teachers) and (self.signals == "none" or self.name in WITH_ONE_MODEL)

    @property
    def kept_signals(self) -> Literal["stored", "live", None]:
        """How signals are kept; None: there are none."""
        if not self.teachers or self.runs_teachers or self.signals == "none":
            return None
        return self.signals

    @property
    def signal_settings(self) -> SignalSettings:
        """What is kept of the teachers' distributions."""
        return SignalSettings(self.top_k, self.sampling, tuple(self.temperatures))

    def identity(self) -> dict[str, Any]:
        """Name and options; with teachers, their weights and what is kept of them."""
        named = {"name": self.name, **self.options}
        if not self.teachers:
            return named
        weights = [teacher.weight for teacher in self.teachers]
        if self.runs_teachers:
            return named | {"weights": weights}
        return named | {"weights": weights, "kept": identity(self.signal_settings)}

    @model_validator(mode="after")
    def _known(self) -> "ObjectiveSettings":
        self.check_name()
        only = _OPTIONS.get(self.name)
        unknown = sorted(self.options.keys() - {only})
        if only and unknown:
            raise ValueError(f"`objective.{unknown[0]}`: {self.name} has `{only}` alone")
        if only and self.teachers:
            other = "distil" if self.name == "cross_entropy" else "self_distillation"
            raise ValueError(f"`objective.teachers`: {self.name} has none; use `name: {other}`")
        if self.name == "distil" and not self.teachers:
            raise ValueError("`objective.teachers`: distil needs at least one: [{path: ...}]")
        if self.name in WITH_ONE_MODEL:
            return self._checked_with_model()
        if self.name == "distil" and self.signals == "none":
            raise ValueError("`objective.signals: none`: distil learns from signals")
        temperature = self.options.get("temperature", self.temperatures[0])
        if self.kept_signals and temperature not in self.temperatures:
            raise ValueError(
                f"`objective.temperature: {temperature}` is not one of `objective.temperatures` "
                f"{self.temperatures}, at which the teachers' tails are kept"
            )
        if self.sampling == "importance" and self.options.get("direction") == "reverse":
            raise ValueError(
                "`objective.direction: reverse` needs `sampling: top`: drawn tokens do not say how "
                "likely the others are"
            )
        if self.sampling == "importance" and temperature != 1.0:
            raise ValueError("`objective.sampling: importance` is drawn at `temperature: 1.0`")
        return self

    def _checked_with_model(self) -> "ObjectiveSettings":
        if len(self.teachers) != 1:
            raise ValueError(
                f"`objective.teachers`: {self.name} learns from one model, not "
                f"{len(self.teachers)}: [{{path: ...}}]"
            )
        for key in ("signals", "top_k", "sampling", "temperatures"):
            value = getattr(self, key)
            if value not in (type(self).model_fields[key].default, "none"):
                raise ValueError(
                    f"`objective.{key}: {value}`: the teacher of {self.name} runs in the training "
                    "workers and keeps no signals: leave it out"
                )
        return self


class StreamedTraining(Optimisation):
    """How a model is trained, in which order, and what is kept on the way."""

    eval_points: Count = Field(
        default=10, description="evaluations over the run, the last at the end"
    )
    lanes: Count | None = Field(
        default=None,
        description="streams that the data are read in, shared out over the workers; default the "
        "largest divisor of `global_batch` up to 64",
    )
    window: Count | None = Field(
        default=None, description="sequences shuffled together; default 2^28 tokens in all windows"
    )
    checkpoint_every: Count | None = Field(
        default=None, description="steps; default a tenth of the training, 1,000 at most"
    )
    keep_last: Annotated[int, Field(ge=0)] = Field(
        default=2,
        description="checkpoints kept, beside the best one; 0: none once the model is there",
    )


class TrainingSettings(StreamedTraining):
    """How a language model is trained."""

    objective: ObjectiveSettings = Field(
        default=ObjectiveSettings(),
        description="what is minimised; cross_entropy takes `z_loss` from beside it",
    )
    num_tokens: Count | None = Field(
        default=None,
        description="default: as many as the data sets have together, each `max_epochs` times if "
        "that is below 1",
    )
    select: Literal["global", "online"] = Field(
        default="global",
        description="online: batches are chosen from the data while it trains (section `online`)",
    )
    activation_checkpointing: bool = Field(
        default=False, description="less memory for a third more work"
    )
    sharding: Literal["none", "fsdp"] = Field(
        default="none", description="fsdp: weights and moments are shared out over the workers"
    )

    @property
    def full_objective(self) -> ObjectiveSettings:
        """The objective, cross_entropy with its `z_loss`, which may stand beside it."""
        if self.objective.name != "cross_entropy" or "z_loss" in self.objective.options:
            return self.objective
        return ObjectiveSettings.model_validate({"name": "cross_entropy", "z_loss": self.z_loss})

    def identity(self) -> dict[str, Any]:
        """What decides the weights: neither what is kept on the way nor how memory is saved."""
        kept = {*Optimisation.model_fields, "eval_points", "lanes", "window"}
        objective = self.full_objective.identity()
        return self.model_dump(mode="json", include=kept) | {"objective": objective}


class TrainSpec(EvaluatedSpec):
    """`job: train`: train a model on a selection, on files, or on a mixture of several."""

    job: Literal["train"]
    task: Literal["language"] = Field(
        default="language", description="or `classify`: a classifier of images, with other keys"
    )
    data: OneOrMore[TrainingData]
    tokenizer: TokenizerSettings | None = Field(
        default=None, description="default: the data's own, or that of `init`"
    )
    model: ModelSettings = ModelSettings()
    init: InitSettings | None = Field(
        default=None, description="start from this model instead of a fresh one of `model`"
    )
    lora: LoraSettings | None = Field(
        default=None, description="train adapters on `init` instead of all its weights"
    )
    heldout: TrainingData | None = Field(default=None, description="measured on, never trained on")
    sequence_length: Annotated[int, Field(ge=8)] | None = Field(
        default=None, description="default that of the tokens; 256 for documents"
    )
    part_tokens: PartTokens = Field(
        default="auto", description="tokens a part that is made of documents; auto: as `select`"
    )
    train: TrainingSettings = TrainingSettings()
    online: OnlineSettings | None = Field(
        default=None, description="models and share of `train.select: online`"
    )

    @field_validator("tokenizer", mode="before")
    @classmethod
    def _tokenizer_name(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fits(self) -> "TrainSpec":
        train, compute = self.train, self.compute
        lanes, batch = train.lanes, train.global_batch
        if lanes is not None and batch != "auto" and batch % lanes:
            raise ValueError(f"`train.lanes` {lanes} does not divide `train.global_batch` {batch}")
        most, least = compute.trainers, compute.min_trainers
        if least is not None and least > most:
            raise ValueError(f"`compute.min_trainers` {least} is above `compute.trainers` {most}")
        if not self.datasets:
            raise ValueError("`data`: give at least one data set")
        if self.init is not None and "model" in self.model_fields_set:
            raise ValueError("give either `model` or `init`: `init` has its own sizes")
        if self.init is None and self.train.objective.name == "masked_tokens":
            raise ValueError("`train.objective: masked_tokens` needs `init`: a masked model")
        self._check_lora()
        trained = self.tokenizer is not None and self.tokenizer.train is not None
        if trained and (self.init is not None or self.online is not None):
            raise ValueError(
                "`tokenizer.train` beside a given model: it knows only the tokens of its "
                "own tokenizer: leave `tokenizer` out, or give a copy of it by `tokenizer.path`"
            )
        gpus = compute.gpus_of(compute.trainer)
        place = device_type(compute.device, gpus)
        sharded = train.sharding == "fsdp" and compute.trainers > 1
        if sharded and place == "cuda" and group_backend(place, gpus) == "gloo":
            raise ValueError(
                f"`train.sharding: fsdp` needs a whole GPU a worker, not {gpus:g}: set "
                "`compute.gpus_per_worker: 1`"
            )
        if (train.select == "online") != (self.online is not None):
            raise ValueError("`train.select: online` and the section `online` go together")
        if self.online is not None and len(self.datasets) > 1:
            raise ValueError("`train.select: online` chooses from one data set, not from a mixture")
        if self.online is not None and any(one.max_epochs for one in self.datasets):
            raise ValueError(
                "`data.max_epochs`: `train.select: online` sees all candidates and trains on few: "
                "leave it out"
            )
        check_mixture(self.datasets)
        if self.heldout is not None:
            check_heldout(self.heldout)
        return self

    def _check_lora(self) -> None:
        if self.lora is None:
            return
        if self.init is None:
            raise ValueError("`lora` needs `init`: adapters are put on a model that exists")
        if self.init.optimizer == "keep":
            raise ValueError("`lora` beside `init.optimizer: keep`: adapters have no moments yet")
        if self.evaluate is not None and self.evaluate.checkpoints:
            raise ValueError("`evaluate.checkpoints` beside `lora`: they hold adapters alone")
        if self.evaluate is not None and self.lora.save == "adapter":
            raise ValueError("`evaluate` beside `lora.save: adapter`: measure a `merged` model")
        if self.train.objective.name == "autodistil":
            raise ValueError("`lora`: autodistil trains slices of the model's own weights")

    @property
    def extra_modules(self) -> tuple[str, ...]:
        return (*super().extra_modules, *(["peft"] if self.lora else []))

    @property
    def num_actors(self) -> int:
        """Actors that have to run at once."""
        scorers = self.compute.scorers if self.online is not None else 0
        return self.compute.trainers + scorers

    @property
    def datasets(self) -> "list[SelectionData | FileData]":
        return self.data if isinstance(self.data, list) else [self.data]


def check_width(spec: TrainSpec) -> None:
    """Check that the lanes, or a given global batch, can be shared out to the workers.

    Raises:
        SpecError: they cannot; names the numbers of workers that can.
    """
    whole = spec.train.lanes or spec.train.global_batch
    if whole != "auto" and whole % spec.compute.trainers:
        fits = [n for n in range(1, whole + 1) if whole % n == 0]
        raise SpecError(
            f"`compute.trainers` {spec.compute.trainers} does not divide `train.global_batch` "
            f"{spec.train.global_batch} (`train.lanes` {spec.train.lanes or 'by default'}): use "
            f"one of {fits}"
        )
