"""The spec of `job: train`."""

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from stillhouse.compute_settings import device_type, group_backend
from stillhouse.data_settings import DataSource, PartTokens
from stillhouse.errors import SpecError
from stillhouse.spec import Count, JobSpec, ModelSettings, Optimisation, ScoringSettings, Settings
from stillhouse.tokenizer_settings import BOS_SETTING

Weight = Annotated[float, Field(gt=0)]


class SelectionData(Settings):
    """Sequences of a selection."""

    selection: str = Field(description="URI of a selection, of the run that made it, or STORE#NAME")
    weight: Weight = Field(default=1.0, description="share in a mixture, against the others'")


class FileData(DataSource):
    """Parquet files of tokens (a column `input_ids`), a tokens artifact, or documents."""

    weight: Weight = Field(default=1.0, description="share in a mixture, against the others'")


def _form(value: Any) -> str:
    has = "selection" in value if isinstance(value, dict) else hasattr(value, "selection")
    return "[selection]" if has else "[files]"


TrainingData: TypeAlias = Annotated[
    Annotated[SelectionData, Tag("[selection]")] | Annotated[FileData, Tag("[files]")],
    Discriminator(_form),
]


class GivenTokenizer(Settings):
    """A tokenizer from a folder, URI or hub name."""

    path: str
    eos_token: str | None = Field(
        default=None, description="stands between documents; default: its own"
    )
    bos: Literal["auto"] | bool = Field(default="auto", description=BOS_SETTING)


class GivenModel(Settings):
    """A causal language model to score with."""

    path: str = Field(description="a transformers folder, URI or hub name")


class OnlineSettings(Settings):
    """Scorers ahead of the trainer: of tau x batch candidates the best make the batch."""

    prior: GivenModel
    conditional: GivenModel
    tau: Annotated[float, Field(gt=1.0)] = Field(
        description="candidates scored for each sequence trained on"
    )
    scoring: ScoringSettings = ScoringSettings()


class TrainingSettings(Optimisation):
    """How the model is trained, in which order, and what is kept on the way."""

    num_tokens: Count | None = Field(default=None, description="default: one pass over the data")
    select: Literal["global", "online"] = Field(
        default="global",
        description="online: batches are chosen from the data while it trains (section `online`)",
    )
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
    keep_last: Count = Field(default=2, description="checkpoints kept, beside the best one")
    activation_checkpointing: bool = Field(
        default=False, description="less memory for a third more work"
    )
    sharding: Literal["none", "fsdp"] = Field(
        default="none", description="fsdp: weights and moments are shared out over the workers"
    )


class TrainSpec(JobSpec):
    """`job: train`: train a model on a selection, on files, or on a mixture of several."""

    job: Literal["train"]
    data: TrainingData | list[TrainingData]
    tokenizer: GivenTokenizer | None = Field(
        default=None, description="default: the selection's own"
    )
    model: ModelSettings = ModelSettings()
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
    def _lanes_fit(self) -> "TrainSpec":
        lanes, batch = self.train.lanes, self.train.global_batch
        if lanes is not None and batch != "auto" and batch % lanes:
            raise ValueError(f"`train.lanes` {lanes} does not divide `train.global_batch` {batch}")
        most, least = self.compute.trainers, self.compute.min_trainers
        if least is not None and least > most:
            raise ValueError(f"`compute.min_trainers` {least} is above `compute.trainers` {most}")
        if isinstance(self.data, list) and not self.data:
            raise ValueError("`data`: give at least one data set")
        return self

    @model_validator(mode="after")
    def _shards_fit(self) -> "TrainSpec":
        compute = self.compute
        gpus = compute.gpus_of(compute.trainer)
        place = device_type(compute.device, gpus)
        sharded = self.train.sharding == "fsdp" and compute.trainers > 1
        if sharded and place == "cuda" and group_backend(place, gpus) == "gloo":
            raise ValueError(
                f"`train.sharding: fsdp` needs a whole GPU a worker, not {gpus:g}: set "
                "`compute.gpus_per_worker: 1`"
            )
        return self

    @model_validator(mode="after")
    def _online_fits(self) -> "TrainSpec":
        if (self.train.select == "online") != (self.online is not None):
            raise ValueError("`train.select: online` and the section `online` go together")
        if self.online is not None and len(self.datasets) > 1:
            raise ValueError("`train.select: online` chooses from one data set, not from a mixture")
        return self

    @property
    def num_actors(self) -> int:
        """Workers that have to run at once."""
        scorers = self.compute.scorers if self.online is not None else 0
        return self.compute.trainers + scorers

    @property
    def datasets(self) -> "list[SelectionData | FileData]":
        """The data sets as a list."""
        return self.data if isinstance(self.data, list) else [self.data]


def check_width(spec: TrainSpec) -> None:
    """Refuse a number of workers that the global batch, where it is given, does not divide into.

    Raises:
        SpecError: naming the numbers that would do.
    """
    whole = spec.train.lanes or spec.train.global_batch
    if whole != "auto" and whole % spec.compute.trainers:
        fits = [n for n in range(1, whole + 1) if whole % n == 0]
        raise SpecError(
            f"`compute.trainers` {spec.compute.trainers} does not divide `train.global_batch` "
            f"{spec.train.global_batch} (`train.lanes` {spec.train.lanes or 'by default'}): use "
            f"one of {fits}"
        )
