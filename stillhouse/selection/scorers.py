"""Scorers: one value for each sequence of a token part, stored apart and joined at the selection.

A scorer says what its values mean (`unit`) and is named by the fingerprint of all that they depend
on. Language models also give the NLL of every document's piece, so that numbers per source and per
document are right for packed sequences too.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stillhouse.selection.baselines import log_importance
from stillhouse.selection.color import TokenLosses, piece_sums
from stillhouse.selection.contamination import NgramIndex
from stillhouse.storage.artifact import PartRef, Store, libraries
from stillhouse.storage.parquet import read_table
from stillhouse.storage.task import Output, Task
from stillhouse.text.pieces import Pieces, read_pieces, token_ids
from stillhouse.text.tokenizer import Tokenizer

SCORES_SCHEMA = pa.schema(
    [
        ("value", pa.float32()),
        ("piece_nll_sum", pa.list_(pa.float32())),
        ("piece_tokens", pa.list_(pa.int32())),
    ]
)


class Scorer(Protocol):
    """Maps a token part to scores: one row for each of its rows, in order."""

    def score(self, tokens: pa.Table) -> pa.Table:
        """A table of `SCORES_SCHEMA`."""
        ...

    def made_by(self) -> dict[str, Any]:
        """What equal bytes are promised for: device, dtype, sequences a pass, and libraries."""
        ...


class TextScorer:
    """What scorers without a model share."""

    def made_by(self) -> dict[str, Any]:
        """The libraries."""
        return libraries()


class ScoringLosses(TokenLosses, Protocol):
    """A language model that scores parts."""

    @property
    def micro_batch(self) -> int | None:
        """Sequences that are scored at once, once some were scored."""
        ...


@dataclass(frozen=True)
class ScoreTask(Task):
    """Score one token part. Counts are tokens, and rows whose value is NaN.

    Scores of a language model that another worker wrote first may stand where they agree.

    Attributes:
        scorer: fingerprint of all that its values depend on.
        part: the token part.
    """

    KIND = "scores"
    VERSION = 3

    scorer: str
    part: PartRef

    def load(self, store: Store) -> pa.Table:
        """The tokens."""
        return read_table(store.path(self.part.path))

    def tokens_in(self, table: pa.Table) -> int:
        """Those that were scored."""
        return self.part.num_tokens

    def run(self, store: Store, host: Scorer, loaded: pa.Table) -> Output:
        """One table."""
        scores = host.score(loaded)
        if scores.num_rows != self.part.num_rows:
            raise AssertionError(f"{scores.num_rows} scores for {self.part.num_rows} rows")
        nan = int(np.isnan(scores["value"].to_numpy()).sum())
        counts = {"tokens": self.part.num_tokens, "nan": nan}
        made_by = host.made_by()
        tolerance = TOLERANCES.get(made_by.get("dtype", ""))
        agrees = None if tolerance is None else partial(agree, tolerance=tolerance)
        return Output([scores], counts, made_by, agrees=agrees)


@dataclass(frozen=True, slots=True)
class LanguageModelScorer:
    """Mean NLL in nats over the T-1 predicted positions; lower is likelier."""

    model: ScoringLosses
    device: str = ""
    """Its name."""
    dtype: str = ""

    def made_by(self) -> dict[str, Any]:
        """What its losses depend on, up to rounding."""
        made = {"device": self.device, "dtype": self.dtype, "micro_batch": self.model.micro_batch}
        return made | libraries()

    def score(self, tokens: pa.Table) -> pa.Table:
        """Values and, for each piece, NLL sum and number of predicted tokens."""
        losses = self.model.token_nll(token_ids(tokens))
        pieces = read_pieces(tokens)
        sums, counts = piece_sums(losses, pieces.sequence, pieces.start, pieces.end)
        offsets = pa.array(pieces.offsets, pa.int32())
        return pa.Table.from_arrays(
            [
                pa.array(losses.mean(axis=1, dtype=np.float64).astype(np.float32)),
                pa.ListArray.from_arrays(offsets, pa.array(sums)),
                pa.ListArray.from_arrays(offsets, pa.array(counts)),
            ],
            schema=SCORES_SCHEMA,
        )


@dataclass(frozen=True, slots=True)
class DsirScorer(TextScorer):
    """Log importance weight of a sequence's text (DSIR); larger is more like the target."""

    log_ratios: NDArray[np.float64]
    tokenizer: Tokenizer

    def score(self, tokens: pa.Table) -> pa.Table:
        """One sum over hashed n-grams a sequence."""
        values = [
            log_importance(self.tokenizer.decode(ids), self.log_ratios) for ids in token_ids(tokens)
        ]
        return plain_scores(np.array(values, np.float32))


@dataclass(frozen=True, slots=True)
class ContaminationScorer(TextScorer):
    """1 where a sequence holds a document that shares word 13-grams with held-out text, else 0."""

    index: NgramIndex
    tokenizer: Tokenizer

    def score(self, tokens: pa.Table) -> pa.Table:
        """Documents are judged whole: all their pieces in the part are read as one text.

        `piece_tokens` holds the tokens of the pieces whose document is contaminated, else 0.
        """
        pieces = read_pieces(tokens)
        values = np.zeros(tokens.num_rows, np.float32)
        flagged = np.zeros(len(pieces.start), np.int32)
        for first, last, ids in document_tokens(token_ids(tokens), pieces):
            if self.index.hits(self.tokenizer.decode(ids)):
                values[pieces.sequence[first:last]] = 1.0
                flagged[first:last] = pieces.num_tokens[first:last]
        lists = pa.ListArray.from_arrays(pa.array(pieces.offsets, pa.int32()), pa.array(flagged))
        return plain_scores(values).set_column(2, SCORES_SCHEMA.field(2), lists)


def document_tokens(
    input_ids: NDArray[Any], pieces: Pieces
) -> Iterator[tuple[int, int, NDArray[Any]]]:
    """For each document of a part: its first and one past its last piece, and its tokens."""
    flat, length = input_ids.reshape(-1), input_ids.shape[1]
    owners = pieces.owners()
    firsts = np.flatnonzero(np.diff(owners, prepend=-1))
    begin = pieces.sequence * length + pieces.start
    end = pieces.sequence * length + pieces.end
    for first, last in zip(firsts, [*firsts[1:], len(owners)], strict=True):
        yield int(first), int(last), flat[begin[first] : end[last - 1]]


def plain_scores(values: NDArray[np.float32]) -> pa.Table:
    """A scores table without pieces."""
    nothing = [pa.nulls(len(values), SCORES_SCHEMA.field(i).type) for i in (1, 2)]
    return pa.Table.from_arrays([pa.array(values, pa.float32()), *nothing], schema=SCORES_SCHEMA)


TOLERANCES = {"bfloat16": 2e-2, "float32": 1e-4}
"""Of mean losses that were made with other libraries, on other devices, or in other batches."""


def agree(scores: pa.Table, others: pa.Table, tolerance: float) -> bool:
    """Whether two tables of scores are equal up to a tolerance, absolute and relative."""
    for name in scores.column_names:
        mine, theirs = (_numbers(table[name]) for table in (scores, others))
        if len(mine) != len(theirs):
            return False
        if not np.allclose(mine, theirs, rtol=tolerance, atol=tolerance, equal_nan=True):
            return False
    return True


def _numbers(column: pa.ChunkedArray) -> NDArray[Any]:
    """The numbers of a column, or in its lists."""
    array = column.combine_chunks()
    values = array.flatten() if pa.types.is_list(array.type) else array
    return values.to_numpy(zero_copy_only=False)
