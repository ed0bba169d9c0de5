"""Scorers: one value for each sequence of a token part, stored apart and joined by the ranking.

A language model also gives the loss of every document's piece, so that numbers per source and per
document are right for packed sequences too. All others see decoded text; what they learn from the
target and the pool is fitted once and kept in the store like a model, as named arrays.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stillhouse.selection.color import piece_sums
from stillhouse.selection.sampling import sample_rows
from stillhouse.spec import ScoringSettings
from stillhouse.storage.artifact import Manifest, PartRef, Store, libraries
from stillhouse.storage.filesystem import join, read_bytes
from stillhouse.storage.folders import put_folder
from stillhouse.storage.parquet import read_table
from stillhouse.storage.task import Output, Place, Task
from stillhouse.text.pieces import LOSS_MASK, Pieces, read_pieces, token_ids
from stillhouse.text.tasks import PackTask, kept_documents
from stillhouse.text.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from stillhouse.models.scoring import ScoringModel

Arrays = Mapping[str, NDArray[Any]]
SCORES_SCHEMA = pa.schema(
    [
        ("value", pa.float32()),
        ("piece_nll_sum", pa.list_(pa.float32())),
        ("piece_tokens", pa.list_(pa.int32())),
    ]
)
TOLERANCES = {"bfloat16": 2e-2, "float32": 1e-4}
"""Of mean losses that were made with other libraries, on other devices, or in other batches."""
_ARRAYS_FILE = "statistics.safetensors"


class Scorer(Protocol):
    """Maps a token part to scores."""

    def score(self, tokens: pa.Table) -> pa.Table:
        """A table of `SCORES_SCHEMA`: one row for each row of the part, in order."""
        ...

    def made_by(self) -> dict[str, Any]:
        """What the scores depend on up to rounding: libraries, device, dtype, micro-batch."""
        ...


@dataclass(frozen=True)
class ScoreTask(Task):
    """Score one token part. Counts are tokens, and rows whose value is NaN.

    If another worker wrote the part first, its scores are kept where they agree up to rounding.

    Attributes:
        scorer: fingerprint of all that its values depend on.
    """

    KIND = "scores"
    VERSION = 3

    scorer: str
    part: PartRef

    def load(self, store: Store) -> pa.Table:
        return read_table(store.path(self.part.path))

    def tokens_in(self, table: pa.Table) -> int:
        return self.part.num_tokens

    def run(self, store: Store, host: Scorer, loaded: pa.Table) -> Output:
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
    """Mean NLL in nats over the T-1 predicted positions, of answers where the part marks them;
    lower is likelier. NaN for a row that holds no token of an answer.
    """

    model: "ScoringModel"
    device: str = ""
    dtype: str = ""

    def made_by(self) -> dict[str, Any]:
        made = {"device": self.device, "dtype": self.dtype, "micro_batch": self.model.micro_batch}
        return made | libraries()

    def score(self, tokens: pa.Table) -> pa.Table:
        losses = self.model.token_nll(token_ids(tokens))
        pieces = read_pieces(tokens)
        owned = pieces.sequence, pieces.start, pieces.end
        answers = answer_mask(tokens)
        values = mean_losses(losses, answers)
        if answers is None:
            return piece_scores(values, pieces, *piece_sums(losses, *owned))
        sums, _ = piece_sums(losses * answers, *owned)
        counts, _ = piece_sums(answers, *owned)
        return piece_scores(values, pieces, sums, counts.astype(np.int32))


def answer_mask(tokens: pa.Table) -> NDArray[np.float32] | None:
    """1 for predicted tokens of answers, else 0: [n, T-1]; None where a part marks none."""
    if LOSS_MASK not in tokens.column_names:
        return None
    flat = tokens[LOSS_MASK].combine_chunks().flatten().to_numpy()
    return flat.reshape(tokens.num_rows, -1)[:, 1:].astype(np.float32)


def mean_losses(
    losses: NDArray[np.float32], answers: NDArray[np.float32] | None
) -> NDArray[np.float32]:
    """Means [n] of the losses [n, T-1] of predicted tokens: of answers, if they are marked
    (`answer_mask`), and NaN where a row has none.
    """
    if answers is None:
        return losses.mean(axis=1, dtype=np.float64).astype(np.float32)
    with np.errstate(invalid="ignore"):
        means = (losses * answers).sum(1, dtype=np.float64) / answers.sum(1, dtype=np.float64)
    return means.astype(np.float32)


@dataclass(frozen=True, slots=True)
class LanguageModelHost:
    """Loads a causal language model as a scorer, in the worker."""

    folder: str
    scoring: ScoringSettings
    device: str
    gpus: float
    threads: int
    bos_id: int | None = None

    def build(self, store: Store) -> LanguageModelScorer:
        from stillhouse.models.causal_lm import choose_dtype
        from stillhouse.models.device import choose_device, device_name
        from stillhouse.models.scoring import load_scoring_model

        device = choose_device(self.device, self.gpus)
        model = load_scoring_model(
            self.folder,
            self.scoring,
            device=self.device,
            gpus=self.gpus,
            threads=self.threads,
            bos_id=self.bos_id,
        )
        dtype = str(choose_dtype(self.scoring.dtype, device)).removeprefix("torch.")
        return LanguageModelScorer(model, device_name(device), dtype)


@dataclass(frozen=True)
class FitTask(Task):
    """Fits a scorer of text; the model artifact that holds its arrays is named by the task.

    Attributes:
        documents: the tasks that pack the documents it is fitted on.
        tokenizer: folder of the tokenizer, which the packing tasks identify.
    """

    KIND = "models"

    documents: tuple[PackTask, ...]
    tokenizer: Place[str]
    eos_token: Place[str]

    def fit(self, store: Store) -> Arrays:
        raise NotImplementedError

    def texts(self) -> Iterator[str]:
        """Texts of the documents that the tasks pack, in order."""
        for task in self.documents:
            yield from (document.text for document in kept_documents(task))

    def load_tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.tokenizer, self.eos_token)

    def sampled_texts(self, store: Store, parts: Sequence[PartRef], num_rows: int) -> Iterator[str]:
        """Texts of `num_rows` random sequences of some token parts."""
        tokenizer = self.load_tokenizer()
        for index, rows in sample_rows(parts, num_rows, 0):
            ids = token_ids(read_table(store.path(parts[index].path), ["input_ids"]))
            yield from (tokenizer.decode(row) for row in ids[rows])


class TextScorer:
    """Base of the scorers of text; a subclass takes fitted arrays and a tokenizer first."""

    def __init__(self, arrays: Arrays, tokenizer: Tokenizer) -> None:
        self.arrays, self.tokenizer = arrays, tokenizer

    def made_by(self) -> dict[str, Any]:
        return libraries()

    def score(self, tokens: pa.Table) -> pa.Table:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class TextScorerHost:
    """Builds a scorer of text in the worker, from the fitted arrays in `folder`."""

    scorer: type[TextScorer]
    folder: str
    tokenizer: str
    eos_token: str
    arguments: tuple[Any, ...] = ()

    def build(self, store: Store) -> TextScorer:
        tokenizer = load_tokenizer(self.tokenizer, self.eos_token)
        return self.scorer(load_arrays(self.folder), tokenizer, *self.arguments)


def put_arrays(store: Store, name: str, role: str, arrays: Arrays) -> Manifest:
    """Keep fitted arrays as the model artifact `name`."""
    from safetensors.numpy import save

    content = save(dict(sorted(arrays.items())))
    return put_folder(
        store,
        name,
        lambda folder: (folder / _ARRAYS_FILE).write_bytes(content),
        inputs={},
        settings={},
        totals={"role": role},
    )


def load_arrays(folder: str) -> dict[str, NDArray[Any]]:
    from safetensors.numpy import load

    return load(read_bytes(join(folder, _ARRAYS_FILE)))


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


def piece_scores(
    values: NDArray[np.float32],
    pieces: Pieces,
    sums: NDArray[np.float32] | None,
    counts: NDArray[np.integer],
) -> pa.Table:
    """A scores table with the sum (none: null) and the number of tokens of each piece."""
    offsets = pa.array(pieces.offsets, pa.int32())
    lists = [
        pa.nulls(len(values), SCORES_SCHEMA.field(1).type)
        if sums is None
        else pa.ListArray.from_arrays(offsets, pa.array(sums)),
        pa.ListArray.from_arrays(offsets, pa.array(counts.astype(np.int32))),
    ]
    return pa.Table.from_arrays([pa.array(values, pa.float32()), *lists], schema=SCORES_SCHEMA)


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
    array = column.combine_chunks()
    values = array.flatten() if pa.types.is_list(array.type) else array
    return values.to_numpy(zero_copy_only=False)
