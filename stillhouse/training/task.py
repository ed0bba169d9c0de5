"""What a training of a language model is, as plain values: all that its workers need to be told.

`job: train` and the models of `job: select` are the same task. Without torch, which takes a driver
seconds to import and which it has no use for.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.custom_code import CustomCode
from stillhouse.fingerprint import fingerprint, sha256
from stillhouse.spec import ModelSettings, Optimisation, ScoringSettings
from stillhouse.storage.artifact import Manifest, Store
from stillhouse.training.order import Rows, SampleOrder, default_lanes, default_window
from stillhouse.training.spec import TrainingSettings, minimised

CHECKPOINTS = "checkpoints"
"""Where in the store those of all trainings lie."""
TRAIN_VERSION = 3
_CHECKPOINTS = 10  # of a training, unless that is less often than
_MAX_EVERY = 1000  # steps
LOSS_MASK = "loss_mask"
"""The column that says which tokens the loss counts: 0 or 1 for each of T positions."""
TRAINED_ON = "trained_on.parquet"
"""Rows of token parts that a model was trained on, where they were chosen: `part`, `row`."""

Tell = Callable[[str, dict[str, Any]], None]
"""Says what happens to whoever follows a training: a word, and plain values. Does not wait."""


@dataclass(frozen=True, slots=True)
class TokenSet:
    """Parts of packed sequences, in order.

    Attributes:
        name: what tokens of parts without `documents` are called.
        uris, rows, digests: of each part: where it lies, its sequences to train on, its sha256.
        weight: share in a mixture, against the others'.
        chosen: of each part the rows to train on, int64 ascending; None: all of them.
        tokens: URI of the tokens artifact whose manifest names the raw files of its documents.
        masked: whether parts have a column `loss_mask`, of the tokens that the loss counts.
    """

    name: str
    uris: tuple[str, ...]
    rows: tuple[int, ...]
    digests: tuple[str, ...]
    sequence_length: int
    weight: float = 1.0
    chosen: tuple[NDArray[np.int64], ...] | None = None
    tokens: str | None = None
    masked: bool = False

    @property
    def num_rows(self) -> int:
        """Sequences."""
        return sum(self.rows)

    @property
    def num_tokens(self) -> int:
        """Tokens in them."""
        return self.num_rows * self.sequence_length

    def identity(self) -> str:
        """Fingerprint of the content."""
        rows = [] if self.chosen is None else [sha256(rows.tobytes()) for rows in self.chosen]
        return fingerprint(["token set", self.digests, self.rows, rows])


def token_set(store: Store, made: Manifest, name: str, weight: float = 1.0) -> TokenSet:
    """All parts of a tokens artifact or selection of a store."""
    tokens = made.fingerprint if made.kind == "tokens" else made.inputs["tokens"]
    length = made.parts[0].num_tokens // max(1, made.parts[0].num_rows)
    return TokenSet(
        name=name,
        uris=tuple(store.path(part.path) for part in made.parts),
        rows=tuple(part.num_rows for part in made.parts),
        digests=tuple(part.sha256 for part in made.parts),
        sequence_length=made.settings.get("sequence_length", length),
        weight=weight,
        tokens=store.path("tokens", tokens),
    )


@dataclass(frozen=True, slots=True)
class StartModel:
    """The model of a folder that a training starts from.

    Attributes:
        folder: where it lies.
        digest: of its configuration and weights.
        fresh: take its architecture and sizes alone, with fresh weights.
        moments: name of the checkpoints whose newest one has the optimiser's moments; None: fresh.
    """

    folder: str
    digest: str
    fresh: bool = False
    moments: str | None = None


@dataclass(frozen=True, slots=True)
class OnlineTask:
    """How batches are chosen from a training's data while it goes on.

    Attributes:
        candidates: sequences of a window, tau times the batch.
        lanes, shuffled: of the candidates' order (`SampleOrder`).
        prior, conditional: the models.
        hidden: rows that may not be chosen, ascending, by the index of their part. Nor may a row
            that shares word 13-grams with a held-out one; it is judged by its own text, not by its
            whole documents.
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


@dataclass(frozen=True, slots=True)
class TrainTask:
    """A model to train on streamed data. Small plain values: a worker needs nothing else.

    Attributes:
        role: `target`, `prior`, `conditional` or `down`.
        label: what people call it, such as `prior` or `color, seed 0`.
        init: what a fresh model looks like, or the model to start from.
        data, heldout: to train on; to measure on.
        tokenizer: folder of the tokenizer that is saved with the model.
        settings: with lanes, window and checkpoint_every filled in.
        online: chooses the batches while it trains; None to take all samples in the order.
        bos_id: stands before every sequence, for the model alone.
        device, gpus: of each worker; no part of the identity.
    """

    role: str
    label: str
    init: ModelSettings | StartModel
    data: tuple[TokenSet, ...]
    heldout: TokenSet | None
    tokenizer: str
    tokenizer_digest: str
    eos_token: str
    vocab_size: int
    settings: TrainingSettings
    num_steps: int
    device: str
    gpus: float
    bos_id: int | None = None
    online: OnlineTask | None = None
    code: CustomCode | None = None
    """Of an objective that is the user's."""

    @property
    def fingerprint(self) -> str:
        """Name of the model artifact."""
        return fingerprint(["train", TRAIN_VERSION, self.identity])

    @property
    def checkpoints(self) -> str:
        """Name of its checkpoints."""
        return checkpoints_of(self.fingerprint)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the model, by section; what a checkpoint has to agree with."""
        settings, tokenizer = self.settings, {"sha256": self.tokenizer_digest}
        found: dict[str, Any] = {
            "role": self.role,
            "model": self._start(),
            "train": settings.model_dump(mode="json", include=set(Optimisation.model_fields)),
            "steps": {"num_steps": self.num_steps, "eval_points": settings.eval_points},
            "order": {"lanes": settings.lanes, "window": settings.window},
            "data": {
                "sets": [{"weight": one.weight, "parts": one.identity()} for one in self.data],
                "heldout": self.heldout.identity() if self.heldout else None,
                "sequence_length": self.sequence_length,
            },
            "tokenizer": tokenizer | {"eos_token": self.eos_token},
        }
        objective = minimised(settings)
        found["train"]["objective"] = objective.model_dump(mode="json")
        if self.code is not None:
            found["train"]["objective"]["code"] = self.code.digest
        if self.bos_id is not None:
            found["tokenizer"]["bos_id"] = self.bos_id
        if self.online is not None:
            online = self.online
            found["order"] = {
                "lanes": online.lanes,
                "window": online.shuffled,
                "candidates": online.candidates,
            }
            found["online"] = {
                "models": [online.prior.digest, online.conditional.digest],
                "scoring": online.scoring.model_dump(include={"dtype", "attention"}),
            }
        return found

    def _start(self) -> dict[str, Any]:
        if isinstance(self.init, ModelSettings):
            return self.init.model_dump(mode="json")
        found = {"like" if self.init.fresh else "weights": self.init.digest}
        return found | ({"moments": self.init.moments} if self.init.moments else {})

    @property
    def sequence_length(self) -> int:
        """Tokens of a sequence."""
        return self.data[0].sequence_length

    @property
    def num_positions(self) -> int:
        """Tokens that the model reads at once."""
        return self.sequence_length + int(self.bos_id is not None)

    @property
    def num_tokens(self) -> int:
        """Tokens that it is trained on; more than there are means further epochs."""
        return self.num_steps * self.settings.batch_size * self.sequence_length

    def order(self) -> SampleOrder:
        """The order of its samples, or of the candidates for them.

        Raises:
            InputError: a data set with fewer rows than lanes.
        """
        settings, online = self.settings, self.online
        assert settings.lanes is not None and settings.window is not None
        return SampleOrder(
            [Rows(one.rows, one.weight) for one in self.data],
            global_batch=online.candidates if online else settings.batch_size,
            seed=settings.seed,
            lanes=online.lanes if online else settings.lanes,
            window=online.shuffled if online else settings.window,
        )


def checkpoints_of(model: str) -> str:
    """Name of the checkpoints of a training, by that of its model."""
    return fingerprint(["checkpoints", model])


def with_order(
    settings: TrainingSettings, sets: Sequence[TokenSet], num_steps: int
) -> TrainingSettings:
    """The settings with lanes, window and steps between checkpoints where they say none."""
    lanes = settings.lanes or default_lanes(settings.batch_size, min(one.num_rows for one in sets))
    length = sets[0].sequence_length
    every = max(1, min(_MAX_EVERY, num_steps // _CHECKPOINTS))
    return settings.model_copy(
        update={
            "lanes": lanes,
            "window": settings.window or default_window(lanes, length, len(sets)),
            "checkpoint_every": settings.checkpoint_every or every,
        }
    )
