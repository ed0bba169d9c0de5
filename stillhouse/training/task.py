"""What trainings are, as plain values: all that the workers need to be told.

Without torch, which takes a driver seconds to import and which it has no use for.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.fingerprint import fingerprint
from stillhouse.spec import ModelSettings, Optimisation, ScoringSettings
from stillhouse.training.order import Rows, SampleOrder
from stillhouse.training.spec import TrainingSettings

CHECKPOINTS = "checkpoints"
"""Where in the store those of all trainings lie."""
MODEL_VERSION = 2
TRAINED_ON = "trained_on.parquet"

Tell = Callable[[str, dict[str, Any]], None]
"""Says what happens to whoever follows a training: a word, and plain values. Does not wait."""


@dataclass(frozen=True, slots=True)
class DataPart:
    """A part to train on: all of its rows, or the given ones."""

    path: str
    sha256: str = ""
    rows: NDArray[np.int64] | None = None


@dataclass(frozen=True, slots=True)
class SameArchitecture:
    """A fresh model of the architecture and sizes of the one in `folder`."""

    folder: str


@dataclass(frozen=True, slots=True)
class ModelTask:
    """A model to train. Small plain values: a worker needs nothing else.

    Attributes:
        fingerprint: name of the model artifact.
        label: what people call it, such as `prior` or `color, seed 0`.
        init: folder of the model to start from, or what a fresh one looks like.
        data: parts to train on, in order.
        num_tokens: tokens to train on; more than there are means further epochs.
        heldout: token parts to measure on; none to measure nothing.
        eval_points: measurements over the run, the last at its end.
        tokenizer: folder in the store whose tokenizer is saved with the model.
        bos_id: stands before every sequence, for the model alone.
    """

    fingerprint: str
    label: str
    role: str
    init: str | ModelSettings | SameArchitecture
    data: tuple[DataPart, ...]
    num_tokens: int
    settings: Optimisation
    seed: int
    heldout: tuple[str, ...]
    eval_points: int
    sequence_length: int
    vocab_size: int
    eos_token: str
    tokenizer: str
    inputs: dict[str, Any]
    device: str
    gpus: float
    bos_id: int | None = None

    @property
    def num_positions(self) -> int:
        """Tokens that the model reads at once."""
        return self.sequence_length + int(self.bos_id is not None)


def model_name(
    role: str, init: object, data: object, settings: Optimisation, seed: int, num_tokens: int
) -> str:
    """The fingerprint of a training: what it starts from, sees, and how it learns."""
    learning = settings.model_dump(include=set(Optimisation.model_fields) - {"seed"})
    return fingerprint(["model", MODEL_VERSION, role, init, data, learning, seed, num_tokens])


@dataclass(frozen=True, slots=True)
class OnlineTask:
    """A pool to choose batches from. Small plain values: a restart needs nothing else.

    Attributes:
        parts: URIs of its token parts.
        rows: of each of them.
        candidates: sequences of a window, tau times the batch.
        lanes, shuffled, seed: of the candidates' order (`SampleOrder`).
        prior, conditional: folders of the models.
        tokenizer, eos_token: to read documents with.
        heldout: URIs of the token parts that are measured on. A row that shares word 13-grams
            with them is not chosen; it is judged by its own text, not by its whole documents.
        hidden: other rows that may not be chosen, ascending, by the index of their part.
        device, gpus, threads: of each scorer.
    """

    parts: tuple[str, ...]
    rows: tuple[int, ...]
    candidates: int
    lanes: int
    shuffled: int
    seed: int
    prior: str
    conditional: str
    scoring: ScoringSettings
    tokenizer: str
    eos_token: str
    heldout: tuple[str, ...]
    hidden: Mapping[int, NDArray[np.int64]]
    device: str
    gpus: float
    threads: int
    bos_id: int | None = None

    def order(self) -> SampleOrder:
        """The order of the candidates.

        Raises:
            InputError: fewer sequences than lanes.
        """
        return SampleOrder(
            [Rows(self.rows)],
            global_batch=self.candidates,
            seed=self.seed,
            lanes=self.lanes,
            window=self.shuffled,
        )


@dataclass(frozen=True, slots=True)
class TrainTask:
    """A model to train on streamed data. Small plain values: a worker needs nothing else.

    Attributes:
        fingerprint: name of the model artifact.
        checkpoints: name of its checkpoints.
        identity: what decides the model, by section; what a checkpoint has to agree with.
        parts: URIs of the parts of all data sets, in the order's numbering.
        datasets: the rows of each data set's parts, and its weight.
        names: of the data sets.
        heldout: URIs of token parts to measure on; none to measure nothing.
        tokenizer: folder whose tokenizer is saved with the model.
        settings: with lanes and window filled in.
        checkpoint_every: steps.
        online: chooses the batches while it trains; None to take all samples in the order.
    """

    fingerprint: str
    checkpoints: str
    label: str
    identity: dict[str, Any]
    parts: tuple[str, ...]
    datasets: tuple[Rows, ...]
    names: tuple[str, ...]
    heldout: tuple[str, ...]
    sequence_length: int
    vocab_size: int
    tokenizer: str
    eos_token: str
    model: ModelSettings
    settings: TrainingSettings
    num_steps: int
    checkpoint_every: int
    device: str
    gpus: float
    online: OnlineTask | None = None
    bos_id: int | None = None

    @property
    def num_positions(self) -> int:
        """Tokens that the model reads at once."""
        return self.sequence_length + int(self.bos_id is not None)

    def order(self) -> SampleOrder:
        """The order of its samples.

        Raises:
            InputError: a data set with fewer rows than lanes.
        """
        settings = self.settings
        assert settings.lanes is not None and settings.window is not None
        return SampleOrder(
            self.datasets,
            global_batch=settings.batch_size,
            seed=settings.seed,
            lanes=settings.lanes,
            window=settings.window,
        )
