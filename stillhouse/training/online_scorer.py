"""Makes a Scorer ahead of the trainer from a task's plain values."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from stillhouse.models.scoring import load_scoring_model
from stillhouse.selection.contamination import NgramIndex
from stillhouse.storage.parquet import read_table
from stillhouse.text.pieces import token_ids
from stillhouse.text.tokenizer import load_tokenizer
from stillhouse.training.batches import Batch
from stillhouse.training.fetch import PartReader, read_ahead
from stillhouse.training.online import WindowScorer
from stillhouse.training.stream import TokenStream
from stillhouse.training.task import OnlineTask


def online_scorer(task: OnlineTask, rank: int, num_scorers: int) -> WindowScorer:
    """The `rank`-th of a task's scorers.

    Raises:
        ModelError, SpecError: as `load_scoring_model`.
    """
    stream = TokenStream(
        task.order(),
        read_ahead(PartReader(task.parts), task.shuffled),
        rank=rank,
        num_workers=num_scorers,
        vocab_size=load_tokenizer(task.tokenizer, task.eos_token).vocab_size,
    )
    prior, conditional = (
        load_scoring_model(
            path,
            task.scoring,
            device=task.device,
            gpus=task.gpus,
            threads=task.threads,
            bos_id=task.bos_id,
        )
        for path in (task.prior, task.conditional)
    )
    return WindowScorer(stream, prior, conditional, _excluded(task))


def _excluded(task: OnlineTask) -> Callable[[Batch], NDArray[np.bool_]]:
    tokenizer = load_tokenizer(task.tokenizer, task.eos_token)
    measured = (ids for uri in task.heldout for ids in token_ids(read_table(uri)))
    index = NgramIndex.from_texts(map(tokenizer.decode, measured))

    def excluded(batch: Batch) -> NDArray[np.bool_]:
        found = np.zeros(len(batch.samples), np.bool_)
        parts, rows = batch.samples.T
        for part in np.unique(parts).tolist():
            if part in task.hidden:
                found |= (parts == part) & np.isin(rows, task.hidden[part])
        if len(index.hashes):
            texts = map(tokenizer.decode, batch.input_ids.numpy())
            found |= np.array([index.hits(text) > 0 for text in texts], np.bool_)
        return found

    return excluded
