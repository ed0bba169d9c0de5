"""Online selection: CoLoR-Filter's batchwise form, scored ahead of the trainer, nothing stored.

    candidates  window n of the pool's order: the next tau * b sequences
    score       prior loss - conditional loss of each (`stillhouse.selection.color`)
    batch n     the b best of them, in the candidates' order

(Brandfonbrener et al. 2024, section 3; Algorithm 1 is the global form.) Each scorer has whole lanes
of the candidates' order, as training workers do, so that one of them reads each part, and batches
are the same for any number of scorers and of training workers.
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
from stillhouse.training.fetch import PartReader, read_ahead
from stillhouse.training.stream import Batch, BatchSource, TokenSources, TokenStream
from stillhouse.training.task import OnlineTask, TrainTask


@dataclass(frozen=True, slots=True)
class ScoredWindow:
    """The scored sequences of a window in one scorer's lanes, in order.

    Attributes:
        input_ids: integers [n, T].
        samples: int64 [n, 2], part and row.
        scores: float32 [n], larger is better; NaN if a loss is NaN or the row is excluded.
        sources: of every token [n, T].
    """

    input_ids: NDArray[Any]
    samples: NDArray[np.int64]
    scores: NDArray[np.float32]
    sources: TokenSources


class WindowScorer:
    """Scores the windows of one scorer's lanes.

    Args:
        stream: its lanes of the candidates' order.
        excluded: marks the rows of a batch that may not be chosen, bool [n].
    """

    def __init__(
        self,
        stream: BatchSource,
        prior: TokenLosses,
        conditional: TokenLosses,
        excluded: Callable[[Batch], NDArray[np.bool_]] | None = None,
    ) -> None:
        self._stream, self._models = stream, (prior, conditional)
        self._excluded = excluded
        self._state = stream.state_dict()
        self._size = int(self._state["order"]["global_batch"])
        self._next = 0

    def window(self, number: int) -> ScoredWindow:
        """The candidates of window `number`; other than the next one, they are sought."""
        if number != self._next:
            self._stream.load_state_dict(self._state | {"consumed": number * self._size})
        batch = self._stream.next_batch()
        self._next = number + 1
        ids = batch.inputs.numpy()
        losses = [model.token_nll(ids) for model in self._models]
        means = [nll.mean(axis=1, dtype=np.float64).astype(np.float32) for nll in losses]
        scores = color_score(*means)
        if self._excluded is not None:
            scores[self._excluded(batch)] = np.nan
        assert batch.sources is not None
        return ScoredWindow(ids, batch.samples, scores, batch.sources)


def best_of(shares: Sequence[ScoredWindow], count: int) -> ScoredWindow:
    """The `count` best candidates of a window, in their order; of equally good ones the first.

    Args:
        shares: of all scorers, by rank.

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
    place: dict[str, int] = {}
    codes: list[NDArray[np.int32]] = []
    for source in (share.sources for share in shares):
        table = [place.setdefault(name, len(place)) for name in source.names]
        codes.append(np.array(table, np.int32)[source.codes])
    return ScoredWindow(
        np.concatenate([share.input_ids for share in shares])[kept],
        np.concatenate([share.samples for share in shares])[kept],
        scores[kept],
        TokenSources(np.concatenate(codes)[kept], tuple(place)),
    )


Ask = Callable[[int], Sequence[ScoredWindow]]
"""Maps a window's number to the scorers' shares of it; called with ascending numbers."""


class OnlineBatches:
    """A training worker's rows of the batches that scorers choose; a `BatchSource`.

    The state is the number of windows consumed, for any number of workers and scorers.

    Args:
        order: of the candidates (`SampleOrder.describe`).
        global_batch: sequences kept of each window.
        rank, num_workers: determine this worker's rows, which are neighbours.
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
        best = best_of(self._ask(self._window), self._size)
        self._window += 1
        mine = self._rows
        return Batch(
            torch.from_numpy(best.input_ids[mine].astype(np.int64)),
            best.samples[mine],
            TokenSources(best.sources.codes[mine], best.sources.names),
        )

    def close(self) -> None:
        """Nothing to do: scorers read ahead."""

    def state_dict(self) -> dict[str, Any]:
        return self._identity | {"window": self._window}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after `window` windows.

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
    """Marks hidden rows, and rows that share word 13-grams with the held-out sequences."""
    tokenizer = load_tokenizer(task.tokenizer, task.eos_token)
    uris = task.heldout.uris if task.heldout else ()
    measured = (ids for uri in uris for ids in token_ids(read_table(uri)))
    index = NgramIndex.from_texts(map(tokenizer.decode, measured))

    def excluded(batch: Batch) -> NDArray[np.bool_]:
        marked = np.zeros(len(batch.samples), np.bool_)
        parts, rows = batch.samples.T
        for part in online.hidden.keys() & set(parts.tolist()):
            marked |= (parts == part) & np.isin(rows, online.hidden[part])
        if len(index.hashes):
            texts = map(tokenizer.decode, batch.inputs.numpy())
            marked |= np.array([index.hits(text) > 0 for text in texts], np.bool_)
        return marked

    return excluded
