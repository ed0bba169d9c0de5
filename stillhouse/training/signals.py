"""Teacher signals: what a language model says of every predicted token.

    signals/parts/<task>-<n>.parquet    one row for each row of the token part
        ids        int32 [(T-1) * k]    the likeliest tokens, or those that were drawn
        log_probs  float16 [(T-1) * k]  at temperature 1, descending
        tails      float32 [(T-1) * n]  for each of n temperatures t, the log of the summed p^(1/t)
                                        of all other tokens

With `sampling: importance` the k tokens of a position are drawn in proportion to the teacher's
probabilities, with replacement; `log_probs` are then log(count / k), and there is no tail. The
expected distribution is the teacher's own, where the top k with their tail are nearer to it but
not on average equal (sparse logit sampling, Anshumann et al. 2025, arXiv 2503.16870).

Stored signals are made once, by tasks of a pool; live ones while windows of tokens are read. This
module imports no torch until a teacher is built.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stillhouse.spec import ScoringSettings
from stillhouse.storage.artifact import Store, libraries
from stillhouse.storage.parquet import read_table
from stillhouse.storage.task import Output, Place, Task
from stillhouse.text.pieces import token_ids

if TYPE_CHECKING:
    from torch import Tensor

    from stillhouse.models.scoring import ScoringModel

Sampling = Literal["top", "importance"]
COLUMNS = ("ids", "log_probs", "tails")
_PART_TOKENS = 1 << 21
"""Of a part of signals: 400 MB with k = 32. Its rows are a power of two, as a row group's are."""


def column(name: str, teacher: int) -> str:
    """The column of a teacher among those of a batch, such as `ids.0`."""
    return f"{name}.{teacher}"


@dataclass(frozen=True, slots=True)
class SignalSettings:
    """What is kept of a teacher's distributions."""

    top_k: int
    sampling: Sampling = "top"
    temperatures: tuple[float, ...] = (1.0,)

    @property
    def bytes_per_token(self) -> int:
        """Of a predicted token, before compression."""
        return 6 * self.top_k + 4 * len(self.temperatures)


@dataclass(frozen=True, slots=True)
class SignalPart:
    """A part with signals of `rows` consecutive rows of a token part."""

    uri: str
    rows: int


@dataclass(frozen=True, slots=True)
class TeacherHost:
    """A teacher as plain values: named by its weights and by how it reads and computes.

    Attributes:
        digest: of its configuration and weights.
        vocab_size: of the tokenizer; padding of the model's vocabulary is not counted.
        bos_id: put before every sequence.
        folder, device, gpus, threads: location and place, no part of its name.
    """

    digest: str
    vocab_size: int
    bos_id: int | None
    scoring: ScoringSettings
    folder: str
    device: str
    gpus: float
    threads: int

    def identity(self) -> list[Any]:
        return [self.digest, self.vocab_size, self.bos_id, self.scoring.dtype]

    def build(self, store: Store) -> "LanguageTeacher":
        """Load the model."""
        from stillhouse.models.scoring import load_scoring_model

        model = load_scoring_model(
            self.folder,
            self.scoring,
            device=self.device,
            gpus=self.gpus,
            threads=self.threads,
            bos_id=self.bos_id,
        )
        return LanguageTeacher(model, self.vocab_size)


@dataclass(frozen=True)
class SignalTask(Task):
    """One teacher's signals for one token part.

    Attributes:
        part: sha256 of the token part.
        num_rows, sequence_length: of it.
        uri: where it is.
    """

    KIND = "signals"

    teacher: TeacherHost
    settings: SignalSettings
    part: str
    num_rows: int
    sequence_length: int
    uri: Place[str]

    @property
    def part_rows(self) -> list[int]:
        """Rows of each part of signals."""
        most = 1 << ((_PART_TOKENS // self.sequence_length).bit_length() - 1)
        full, rest = divmod(self.num_rows, most)
        return [most] * full + [rest] * (rest > 0)

    def load(self, store: Store) -> NDArray[Any]:
        """The tokens [N, T]."""
        return token_ids(read_table(self.uri, ["input_ids"]))

    def run(self, store: Store, host: "LanguageTeacher", loaded: NDArray[Any]) -> Output:
        """Tables in the order of the rows; counts tokens."""
        counts = {"tokens": self.num_rows * self.sequence_length}
        return Output(self._tables(host, loaded), counts, libraries())

    def _tables(self, host: "LanguageTeacher", ids: NDArray[Any]) -> Iterator[pa.Table]:
        start = 0
        for rows in self.part_rows:
            draws = np.random.default_rng([int(self.part[:16], 16), start])
            yield host.signals(ids[start : start + rows], self.settings, draws)
            start += rows

    def tokens_in(self, table: pa.Table) -> int:
        return table.num_rows * self.sequence_length


@dataclass(frozen=True, slots=True)
class LanguageTeacher:
    """A language model in evaluation mode that answers with signals."""

    model: "ScoringModel"
    vocab_size: int

    def signals(
        self, input_ids: NDArray[Any], settings: SignalSettings, draws: np.random.Generator
    ) -> pa.Table:
        """A table of `COLUMNS` for sequences [N, T].

        Raises:
            InputError: a distribution is not finite.
        """
        from stillhouse.models.token_samples import drawn_tokens, top_tokens

        def reduce(logits: "Tensor", _: "Tensor", *uniform: "Tensor") -> list["Tensor"]:
            logits = logits[:, : self.vocab_size]
            if uniform:
                return drawn_tokens(logits, uniform[0])
            return top_tokens(logits, settings.top_k, settings.temperatures)

        shape = (len(input_ids), input_ids.shape[1] - 1, settings.top_k)
        columns = [draws.random(shape)] if settings.sampling == "importance" else []
        arrays = self.model.map_logits(input_ids, reduce, *columns)
        return pa.table(dict(zip(COLUMNS, map(_lists, arrays), strict=True)))


def with_signals(
    table: pa.Table, teachers: Sequence[LanguageTeacher], settings: SignalSettings
) -> pa.Table:
    """Rows of tokens with the columns of all teachers; what is drawn depends on part and row."""
    ids = token_ids(table)
    first = [int(table[name][0].as_py()) for name in ("part", "row")]
    for i, teacher in enumerate(teachers):
        made = teacher.signals(ids, settings, np.random.default_rng([i, *first]))
        for name in COLUMNS:
            table = table.append_column(column(name, i), made[name])
    return table


def _lists(values: NDArray[Any]) -> pa.FixedSizeListArray:
    """An array [N, ...] as a column of lists."""
    flat = values.reshape(len(values), -1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), flat.shape[1])
