"""A user's own scorer: a class that a spec names, fitted once, and loaded in every worker.

A spec says `scorer: {import: "my_pkg.module:MyScorer"}`. The class has the three methods of
`OwnScorer`: it gets texts and returns numbers. Its code is found without running it, identified by
its content, and sent to the workers as it is: they import it from what was sent and from nowhere
else, and it is never read from the store. What it learned is kept in the store as plain arrays.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stillhouse.custom_code import CustomCode, find_class
from stillhouse.errors import CustomCodeError
from stillhouse.selection.scorers import (
    Arrays,
    FitTask,
    TextScorer,
    document_tokens,
    piece_scores,
    plain_scores,
)
from stillhouse.storage.artifact import PartRef, Store
from stillhouse.text.pieces import Grain, read_pieces, token_ids
from stillhouse.text.tokenizer import Tokenizer

_BATCH = 1024


class OwnScorer(Protocol):
    """The methods of a scorer; it is made as `MyScorer(**scorer.settings)`."""

    def fit(self, target: Iterable[str], pool: Iterable[str]) -> Mapping[str, NDArray[Any]]:
        """Learn from texts, once a job.

        Args:
            target: the target's documents, without the held-out ones.
            pool: texts of random sequences of the pool, about `scorer.num_tokens` tokens.

        Returns:
            All that `load` needs, as named arrays of numbers; they are kept in the store.
        """
        ...

    def load(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Restore what `fit` returned; called once in every worker, on a new object."""
        ...

    def score(self, texts: list[str]) -> NDArray[Any]:
        """Values [n] of n texts, larger is better; NaN excludes a text.

        A text's value must not depend on the other texts of the list.
        """
        ...


def find_code(name: str) -> CustomCode:
    """Find and check the code of a scorer `module:Class`, without running it.

    A top-level module is sent alone; of a package all Python files are sent.

    Raises:
        SpecError: no such module or class, a class without the three methods, too much code.
    """
    return find_class("scorer.import", name, ("fit", "load", "score"))


def fit(
    code: CustomCode, scorer: OwnScorer, target: Iterable[str], pool: Iterable[str]
) -> dict[str, NDArray[Any]]:
    """What the scorer learns, checked to be plain arrays.

    Raises:
        CustomCodeError: whatever the code raised, or a result that is not named arrays of numbers.
    """
    try:
        state = dict(scorer.fit(target, pool))
    except Exception as error:
        raise code.failed("failed in `fit`", error) from error
    for key, value in state.items():
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf":  # pyright: ignore[reportUnnecessaryIsInstance]
            raise CustomCodeError(
                f"scorer {code.name}: `fit` returned {key!r} as {type(value).__name__}: return a "
                "mapping of names to arrays of numbers"
            )
    return {str(key): np.ascontiguousarray(value) for key, value in state.items()}


@dataclass(frozen=True)
class OwnFitTask(FitTask):
    """Fit a user's scorer on the target's documents and `num_rows` random sequences."""

    code: CustomCode
    settings: dict[str, Any]
    pip: tuple[str, ...]
    pool: tuple[PartRef, ...]
    num_rows: int

    def fit(self, store: Store) -> Arrays:
        pool = self.sampled_texts(store, self.pool, self.num_rows)
        return fit(self.code, self.code.build(self.settings), self.texts(), pool)


class OwnTokenScorer(TextScorer):
    """A user's scorer over token parts: it gets the texts of sequences, or of whole documents.

    Args:
        arrays: what `fit` returned.
        grain: what the selection chooses.

    Raises:
        CustomCodeError: whatever the code raised, or a result that is not one number for each text.
    """

    def __init__(
        self,
        arrays: Arrays,
        tokenizer: Tokenizer,
        code: CustomCode,
        settings: Mapping[str, Any],
        grain: Grain,
    ) -> None:
        super().__init__(arrays, tokenizer)
        self._code, self._grain = code, grain
        self._scorer = code.build(settings)
        try:
            self._scorer.load(arrays)
        except Exception as error:
            raise code.failed("failed in `load`", error) from error

    def score(self, tokens: pa.Table) -> pa.Table:
        """One value a sequence; for documents, each document's value at all of its pieces."""
        ids = token_ids(tokens)
        if self._grain == "sequences":
            return plain_scores(self._values([self.tokenizer.decode(row) for row in ids]))
        pieces = read_pieces(tokens)
        documents = list(document_tokens(ids, pieces))
        values = self._values([self.tokenizer.decode(own_ids) for _, _, own_ids in documents])
        by_piece = np.repeat(values, [last - first for first, last, _ in documents])
        sums = (by_piece * pieces.num_tokens).astype(np.float32)
        weights = np.bincount(pieces.sequence, pieces.num_tokens, len(ids))
        means = np.bincount(pieces.sequence, sums, len(ids)) / np.maximum(weights, 1)
        return piece_scores(means.astype(np.float32), pieces, sums, pieces.num_tokens)

    def _values(self, texts: list[str]) -> NDArray[np.float32]:
        batches = [texts[start : start + _BATCH] for start in range(0, len(texts), _BATCH)]
        return np.concatenate([np.zeros(0, np.float32), *map(self._batch, batches)])

    def _batch(self, texts: list[str]) -> NDArray[np.float32]:
        try:
            values = np.asarray(self._scorer.score(texts), np.float32)
        except Exception as error:
            raise self._code.failed("failed in `score`", error) from error
        if values.shape != (len(texts),):
            raise CustomCodeError(
                f"scorer {self._code.name}: `score` returned shape {values.shape} for "
                f"{len(texts)} texts: return one number for each"
            )
        return values
