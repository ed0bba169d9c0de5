"""A training of a language model as plain values: all that its workers need.

`job: train` and the models of `job: select` are the same task. Without torch, which the driver
never imports.

`auto` follows the width H of the model and the number of tokens it is trained on:

    learning rate = 2e-3 sqrt(128 / H), at most 0.5 / H    for a model from scratch
    batch         = 1,024 sqrt(tokens / 1 M) tokens, a power of two sequences, at least 8

Up to H = 256 and 1 M tokens both are measured (`benchmarks/learning_rate.py`,
docs/measurements.md). Above, they follow published practice: Brown et al. (2020), table 2.1, has
6e-4 at a width of 768 and 1.2e-4 at 4,096, where this gives 6.5e-4 and 1.2e-4; the useful batch
grows with about the square root of the tokens (Zhang et al., 2024, "How does critical batch size
scale in pre-training?"), here to 0.6 M at 300 B tokens, against 0.5 M to 3.2 M in GPT-3.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from stillhouse.compute_settings import ComputeSettings
from stillhouse.custom_code import CustomCode
from stillhouse.fingerprint import fingerprint, sha256
from stillhouse.spec import ModelSettings, Optimisation, ScoringSettings
from stillhouse.storage.artifact import Manifest, Store
from stillhouse.storage.task import Place, Task
from stillhouse.training.order import Rows, SampleOrder, default_lanes, default_window
from stillhouse.training.schedule import EVEN, Share
from stillhouse.training.signals import SignalPart, TeacherHost
from stillhouse.training.spec import LoraSettings, TrainingSettings

HALVES = ("validation", "test")
"""Of held-out documents: what variants are chosen on, and what is reported."""
CHECKPOINTS = "checkpoints"
"""The store's folder of checkpoints."""
TRAINED_ON = "trained_on.parquet"
"""Rows of token parts that a model was trained on, where they were chosen: `part`, `row`."""
RECIPE_VERSION = 2
"""Runs are named by their spec, which may say `auto`: raise it when the rule changes."""
_NUM_CHECKPOINTS, _MAX_CHECKPOINT_STEPS = 10, 1000

Tell = Callable[[str, dict[str, Any]], None]
"""Reports an event of a training without waiting: its kind, and plain values."""
Start = Literal["fresh", "trained", "given", "adapters"]
"""What a training starts from: nothing, a model that this job trained, one it was given, or
adapters on one.
"""
_SHARE_OF_RATE: dict[Start, float] = {"fresh": 1.0, "trained": 1.0, "given": 0.1, "adapters": 1.0}
S = TypeVar("S", bound=Optimisation)


@dataclass(frozen=True, slots=True)
class TokenSet:
    """Parts of packed sequences, in order.

    Attributes:
        name: source of the tokens of parts without `documents`.
        uris, rows, digests: of each part: location, number of sequences, sha256.
        share: of a mixture, relative to the others'.
        chosen: of each part the rows to train on, int64 ascending; None: all of them.
        tokens: URI of the tokens artifact whose manifest names the documents' raw files.
        masked: whether the parts have a column `loss_mask`.
        signals: of each teacher, the parts with its signals for each part.
    """

    name: str
    uris: tuple[str, ...]
    rows: tuple[int, ...]
    digests: tuple[str, ...]
    sequence_length: int
    share: Share = EVEN
    chosen: tuple[NDArray[np.int64], ...] | None = None
    tokens: str | None = None
    masked: bool = False
    signals: tuple[tuple[tuple[SignalPart, ...], ...], ...] = ()

    @property
    def num_rows(self) -> int:
        return sum(self.rows)

    @property
    def num_tokens(self) -> int:
        return self.num_rows * self.sequence_length

    def identity(self) -> str:
        """Fingerprint of content and share."""
        rows = [] if self.chosen is None else [sha256(rows.tobytes()) for rows in self.chosen]
        length = self.sequence_length
        share = self.share.identity()
        return fingerprint(["token set", self.digests, self.rows, rows, length, share])


def token_set(store: Store, made: Manifest, name: str, share: Share = EVEN) -> TokenSet:
    """All parts of a tokens artifact or selection of a store."""
    tokens = made.fingerprint if made.kind == "tokens" else made.inputs["tokens"]
    length = made.parts[0].num_tokens // max(1, made.parts[0].num_rows)
    columns = made.settings.get("reading", {}).get("columns", {})  # of tokens
    return TokenSet(
        name=name,
        uris=tuple(store.path(part.path) for part in made.parts),
        rows=tuple(part.num_rows for part in made.parts),
        digests=tuple(part.sha256 for part in made.parts),
        sequence_length=made.settings.get("sequence_length", length),
        share=share,
        tokens=store.path("tokens", tokens),
        masked=not {"prompt", "messages"}.isdisjoint(columns),
    )


@dataclass(frozen=True, slots=True)
class StartModel:
    """A model in a folder that a training starts from.

    Attributes:
        digest: of its configuration and weights.
        fresh: use its architecture and sizes only, with fresh weights.
        moments: name of the checkpoints that have the optimiser's moments; None: fresh ones.
        lora: adapters to train instead of its weights.
    """

    folder: Place[str]
    digest: str
    fresh: bool = False
    moments: str | None = None
    lora: LoraSettings | None = None

    def identity(self) -> dict[str, Any]:
        found: dict[str, Any] = {"like" if self.fresh else "weights": self.digest}
        found |= {"moments": self.moments} if self.moments else {}
        return found | ({"lora": self.lora.model_dump(mode="json")} if self.lora else {})


@dataclass(frozen=True, slots=True)
class OnlineTask:
    """How a training's batches are chosen from its data while it runs.

    Attributes:
        candidates: sequences of a window, tau times the batch.
        lanes, shuffled: of the candidates' order (`SampleOrder`).
        hidden: rows that may not be chosen, ascending, by the index of their part. Nor may a row
            whose own text shares word 13-grams with a held-out one.
        gpus, threads: of each scorer.
    """

    candidates: int
    lanes: int
    shuffled: int
    prior: StartModel
    conditional: StartModel
    scoring: ScoringSettings
    hidden: Mapping[int, NDArray[np.int64]]
    gpus: float
    threads: int

    def identity(self) -> list[Any]:
        models = [self.prior.digest, self.conditional.digest]
        scoring = [self.scoring.dtype, self.scoring.attention]
        return [self.candidates, self.lanes, self.shuffled, *models, *scoring]


@dataclass(frozen=True)
class TrainTask(Task):
    """A model to train on streamed data.

    Attributes:
        role: `target`, `prior`, `conditional` or `down`.
        init: what a fresh model looks like, or the model to start from.
        heldout: measured on, never trained on.
        settings: with lanes, window and checkpoint_every (`with_order`).
        tokenizer: folder of the tokenizer, which is saved with the model.
        bos_id: put before every sequence, for the model only.
        mask_id: of a masked model: the tokenizer's mask token.
        online: chooses the batches; None: all samples in order.
        code: of a user's objective.
        teachers: of the objective; their signals are in the data sets, or made as these are read.
        live: where such teachers run.
        label: name for people, such as `prior` or `color, seed 0`.
        device, gpus: of each worker.
    """

    KIND: ClassVar[str] = "models"
    VERSION: ClassVar[int] = 5

    role: str
    init: ModelSettings | StartModel
    data: tuple[TokenSet, ...]
    heldout: TokenSet | None
    settings: TrainingSettings
    num_steps: int
    tokenizer: Place[str]
    tokenizer_digest: str
    eos_token: str
    vocab_size: int
    bos_id: int | None = None
    online: OnlineTask | None = None
    code: CustomCode | None = None
    teachers: tuple[TeacherHost, ...] = ()
    live: Place[ComputeSettings | None] = None
    mask_id: Place[int | None] = None
    label: Place[str] = ""
    device: Place[str] = "auto"
    gpus: Place[float] = 0

    @property
    def checkpoints(self) -> str:
        return checkpoints_of(self.fingerprint)

    @property
    def lora(self) -> LoraSettings | None:
        """The adapters that are trained instead of all weights."""
        return self.init.lora if isinstance(self.init, StartModel) else None

    @property
    def sharded(self) -> bool:
        """Whether several workers share out the weights."""
        return self.settings.sharding == "fsdp"

    @property
    def step_units(self) -> int:
        """Tokens a step."""
        return self.settings.batch_size * self.sequence_length

    @property
    def sequence_length(self) -> int:
        return self.data[0].sequence_length

    @property
    def num_positions(self) -> int:
        """Tokens that the model reads at once: a sequence, and BOS."""
        return self.sequence_length + int(self.bos_id is not None)

    def order(self) -> SampleOrder:
        """The order of its samples, or of the candidates for them.

        Raises:
            InputError: a data set with fewer rows than lanes.
        """
        settings, online = self.settings, self.online
        assert settings.lanes is not None and settings.window is not None
        return SampleOrder(
            [Rows(one.rows, one.share.weight, one.share.limit) for one in self.data],
            global_batch=online.candidates if online else settings.batch_size,
            seed=settings.seed,
            lanes=online.lanes if online else settings.lanes,
            window=online.shuffled if online else settings.window,
            num_steps=self.num_steps,
        )


def checkpoints_of(model: str) -> str:
    """Name of a training's checkpoints, from its model's name."""
    return fingerprint(["checkpoints", model])


def choose(
    settings: S, *, width: int, num_tokens: float, sequence_length: int, start: Start = "fresh"
) -> S:
    """The settings with numbers in place of `auto`; see the module's text.

    A model that continues from one of this job has the same learning rate; from a given one a
    tenth, for that is likely to be larger and to have been trained for longer. Adapters take about
    ten times the rate of all weights (Schulman et al., 2025, "LoRA without regret").
    """
    chosen: dict[str, float | int] = {}
    if settings.learning_rate == "auto":
        rate = min(2e-3 * math.sqrt(128 / width), 0.5 / width) * _SHARE_OF_RATE[start]
        chosen["learning_rate"] = float(f"{rate:.1e}")
    if settings.global_batch == "auto":
        wanted = 1024 * math.sqrt(num_tokens / 1e6) / sequence_length
        chosen["global_batch"] = max(8, 2 ** round(math.log2(max(wanted, 1))))
    return settings.model_copy(update=chosen)


def steps_between(num_steps: int) -> int:
    """Steps between checkpoints: a tenth of the training, 1,000 at most."""
    return max(1, min(_MAX_CHECKPOINT_STEPS, num_steps // _NUM_CHECKPOINTS))


def with_order(
    settings: TrainingSettings, sets: Sequence[TokenSet], num_steps: int
) -> TrainingSettings:
    """The settings with defaults for lanes, window and steps between checkpoints."""
    lanes = settings.lanes or default_lanes(settings.batch_size, min(one.num_rows for one in sets))
    window = settings.window or default_window(lanes, sets[0].sequence_length, len(sets))
    every = settings.checkpoint_every or steps_between(num_steps)
    return settings.model_copy(update={"lanes": lanes, "window": window, "checkpoint_every": every})
