"""What a Scorer ahead of the trainer is made from, and how it is made from it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stillhouse.models.scoring import load_scoring_model
from stillhouse.selection.contamination import NgramIndex
from stillhouse.spec import ScoringSettings
from stillhouse.storage.artifact import read_table
from stillhouse.text.pieces import token_ids
from stillhouse.text.tokenizer import load_tokenizer
from stillhouse.training.batches import Batch
from stillhouse.training.fetch import PartReader, read_ahead
from stillhouse.training.online import WindowScorer
from stillhouse.training.order import Rows, SampleOrder
from stillhouse.training.stream import TokenStream


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

    def scorer(self, rank: int, num_scorers: int) -> WindowScorer:
        """The `rank`-th of some scorers.

        Raises:
            ModelError, SpecError: as `load_scoring_model`.
        """
        stream = TokenStream(
            self.order(),
            read_ahead(PartReader(self.parts), self.shuffled),
            rank=rank,
            num_workers=num_scorers,
            vocab_size=load_tokenizer(self.tokenizer, self.eos_token).vocab_size,
        )
        prior, conditional = (
            load_scoring_model(
                path, self.scoring, device=self.device, gpus=self.gpus, threads=self.threads
            )
            for path in (self.prior, self.conditional)
        )
        return WindowScorer(stream, prior, conditional, self._excluded())

    def _excluded(self) -> Callable[[Batch], NDArray[np.bool_]]:
        tokenizer = load_tokenizer(self.tokenizer, self.eos_token)
        measured = (ids for uri in self.heldout for ids in token_ids(read_table(uri)))
        index = NgramIndex.from_texts(map(tokenizer.decode, measured))

        def excluded(batch: Batch) -> NDArray[np.bool_]:
            found = np.zeros(len(batch.samples), np.bool_)
            parts, rows = batch.samples.T
            for part in np.unique(parts).tolist():
                if part in self.hidden:
                    found |= (parts == part) & np.isin(rows, self.hidden[part])
            if len(index.hashes):
                texts = map(tokenizer.decode, batch.input_ids.numpy())
                found |= np.array([index.hits(text) > 0 for text in texts], np.bool_)
            return found

        return excluded
