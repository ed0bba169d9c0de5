"""Scorers ahead of the trainer: CoLoR-Filter's batchwise form, which needs no stored scores.

    candidates  window n of the pool's order: the next tau * b sequences
    score       prior loss - conditional loss of each (`stillhouse.selection.color`)
    batch n     the b best of them, in the order in which they came

(Brandfonbrener et al. 2024, section 3: the selection of a batch; Algorithm 1 is the global form.)
Scorers own whole lanes of the candidates' order, as training workers do, so that each part is read
by one of them and the batches are the same for any number of scorers and of training workers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stillhouse.errors import ArtifactError, ModelError
from stillhouse.models.scoring import load_scoring_model
from stillhouse.selection.color import TokenLosses, color_score
from stillhouse.selection.contamination import NgramIndex
from stillhouse.storage.parquet import read_table
from stillhouse.text.pieces import token_ids
from stillhouse.text.tokenizer import load_tokenizer
from stillhouse.training.batches import Batch, BatchSource, TokenSources
from stillhouse.training.fetch import PartReader, read_ahead
from stillhouse.training.stream import TokenStream
from stillhouse.training.task import OnlineTask, TrainTask


@dataclass(frozen=True, slots=True)
class ScoredWindow:
    """Scored sequences of a window, those of one scorer's lanes, in their order.

    Attributes:
        input_ids: integers [n, T].
        samples: int64 [n, 2], part and row.
        scores: float32 [n], larger is better; NaN where a model gave none or a row is excluded.
        sources: int32 [n, T], indices into `names`.
        names: of sources.
    """

    input_ids: NDArray[Any]
    samples: NDArray[np.int64]
    scores: NDArray[np.float32]
    sources: NDArray[np.int32]
    names: tuple[str, ...]


class WindowScorer:
    """Scores the windows of one scorer's lanes, from any window on.

    Args:
        stream: its lanes of the candidates' order.
        prior, conditional: the models.
        excluded: bool [n], which rows of a batch may not be chosen.
    """

    def __init__(
        self,
        stream: BatchSource,
        prior: TokenLosses,
        conditional: TokenLosses,
        excluded: Callable[[Batch], NDArray[np.bool_]] | None = None,
    ) -> None:
        self._stream, self._prior, self._conditional = stream, prior, conditional
        self._excluded = excluded
        self._state = stream.state_dict()
        self._size = int(self._state["order"]["global_batch"])
        self._next = 0

    def window(self, number: int) -> ScoredWindow:
        """The candidates of window `number`; only the one after the last needs no seeking."""
        if number != self._next:
            self._stream.load_state_dict(self._state | {"consumed": number * self._size})
        batch = self._stream.next_batch()
        self._next = number + 1
        ids = batch.input_ids.numpy()
        losses = [model.token_nll(ids) for model in (self._prior, self._conditional)]
        means = [nll.mean(axis=1, dtype=np.float64).astype(np.float32) for nll in losses]
        scores = color_score(*means)
        if self._excluded is not None:
            scores[self._excluded(batch)] = np.nan
        assert batch.sources is not None
        return ScoredWindow(ids, batch.samples, scores, batch.sources.codes, batch.sources.names)


def best_of(shares: Sequence[ScoredWindow], count: int) -> ScoredWindow:
    """The `count` best of a window, whose shares come in the order of the scorers.

    Ties go to whom the order names first. The kept ones stay in that order.

    Raises:
        ModelError: fewer of them have a score.
    """
    scores = np.concatenate([share.scores for share in shares])
    known = int((~np.isnan(scores)).sum())
    if known < count:
        raise ModelError(
            f"{len(scores) - known} of {len(scores)} candidates may not be chosen (excluded, or "
            f"their loss is NaN) and {count} are to be kept: raise `online.tau`"
        )
    kept = np.sort(np.argsort(-scores, kind="stable")[:count])  # NaN comes last
    names = tuple(dict.fromkeys(name for share in shares for name in share.names))
    place = {name: code for code, name in enumerate(names)}
    tables = [np.array([place[name] for name in share.names], np.int32) for share in shares]
    sources = [table[share.sources] for table, share in zip(tables, shares, strict=True)]
    return ScoredWindow(
        np.concatenate([share.input_ids for share in shares])[kept],
        np.concatenate([share.samples for share in shares])[kept],
        scores[kept],
        np.concatenate(sources)[kept],
        names,
    )


Ask = Callable[[int], Sequence[ScoredWindow]]
"""The shares of a window, by its number; asked with numbers that grow."""


class OnlineBatches:
    """A training worker's rows of the batches that scorers choose; a `BatchSource`.

    The state is the number of windows consumed, for any number of workers and scorers.

    Args:
        ask: gives a window's shares, of all scorers.
        order: what decides the candidates (`SampleOrder.describe`).
        global_batch: sequences kept of each window.
        rank, num_workers: which rows of the batch are this worker's: neighbours.
    """

    def __init__(
        self,
        ask: Ask,
        order: dict[str, Any],
        *,
        global_batch: int,
        rank: int = 0,
        num_workers: int = 1,
    ) -> None:
        self._ask, self._size = ask, global_batch
        self._identity = {"candidates": order, "global_batch": global_batch}
        self._rows = slice(
            rank * global_batch // num_workers, (rank + 1) * global_batch // num_workers
        )
        self._window = 0

    def next_batch(self) -> Batch:
        """This worker's rows of the next global batch."""
        best = best_of(self._ask(self._window), self._size)
        self._window += 1
        mine = self._rows
        return Batch(
            torch.from_numpy(best.input_ids[mine].astype(np.int64)),
            best.samples[mine],
            TokenSources(best.sources[mine], best.names),
        )

    def close(self) -> None:
        """Nothing is read ahead here: the scorers do."""

    def state_dict(self) -> dict[str, Any]:
        """How many windows were consumed, and of which candidates."""
        return self._identity | {"window": self._window}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after that many windows.

        Raises:
            ArtifactError: the state is of other candidates.
        """
        identity = {name: value for name, value in state.items() if name != "window"}
        if identity != self._identity:
            raise ArtifactError(
                f"the state chose its batches from {identity}, this run from {self._identity}"
            )
        self._window = int(state["window"])


def online_scorer(task: TrainTask, rank: int, num_scorers: int) -> WindowScorer:
    """The `rank`-th of a task's scorers.

    Raises:
        ModelError, SpecError: as `load_scoring_model`.
    """
    online = task.online
    assert online is not None
    stream = TokenStream(
        task.order(),
        read_ahead(PartReader.of(task.data), online.shuffled),
        rank=rank,
        num_workers=num_scorers,
        vocab_size=task.vocab_size,
    )
    prior, conditional = (
        load_scoring_model(
            model.folder,
            online.scoring,
            device=task.device,
            gpus=online.gpus,
            threads=online.threads,
            bos_id=task.bos_id,
        )
        for model in (online.prior, online.conditional)
    )
    return WindowScorer(stream, prior, conditional, _excluded(task, online))


def _excluded(task: TrainTask, online: OnlineTask) -> Callable[[Batch], NDArray[np.bool_]]:
    tokenizer = load_tokenizer(task.tokenizer, task.eos_token)
    uris = task.heldout.uris if task.heldout else ()
    measured = (ids for uri in uris for ids in token_ids(read_table(uri)))
    index = NgramIndex.from_texts(map(tokenizer.decode, measured))

    def excluded(batch: Batch) -> NDArray[np.bool_]:
        found = np.zeros(len(batch.samples), np.bool_)
        parts, rows = batch.samples.T
        for part in np.unique(parts).tolist():
            if part in online.hidden:
                found |= (parts == part) & np.isin(rows, online.hidden[part])
        if len(index.hashes):
            texts = map(tokenizer.decode, batch.input_ids.numpy())
            found |= np.array([index.hits(text) > 0 for text in texts], np.bool_)
        return found

    return excluded
