"""Statistics of text that a scorer without a network is made from, kept like a model.

DSIR's log ratios of hashed n-grams (target against pool), and the word 13-grams of the held-out
text that contaminated documents are found with, one array each, and whatever arrays a user's
scorer learned: as safetensors.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from stillhouse.selection.baselines import NUM_BUCKETS, log_ratios, ngram_counts
from stillhouse.selection.contamination import NgramIndex
from stillhouse.selection.own import OwnCode, fit
from stillhouse.selection.sampling import sample_rows
from stillhouse.storage.artifact import Manifest, PartRef, Store
from stillhouse.storage.filesystem import join, read_bytes
from stillhouse.storage.folders import put_folder
from stillhouse.storage.parquet import read_table
from stillhouse.storage.task import Place, Task
from stillhouse.text.pieces import token_ids
from stillhouse.text.tasks import PackTask, kept_documents
from stillhouse.text.tokenizer import Tokenizer, load_tokenizer

FILE_NAME = "statistics.safetensors"
SMOOTHING = 1.0
"""Laplace pseudo-count: without it a bucket that a small target lacks decides by itself."""


@dataclass(frozen=True)
class StatisticsTask(Task):
    """Arrays that a scorer is made from; the model artifact of them is named by the task.

    Attributes:
        documents: tasks that pack the documents they are made from.
        tokenizer: where it lies; the tasks name it.
        eos_token: of it.
    """

    KIND = "models"

    documents: tuple[PackTask, ...]
    tokenizer: Place[str]
    eos_token: Place[str]

    def compute(self, store: Store) -> dict[str, NDArray[Any]]:
        """The arrays by name."""
        raise NotImplementedError

    def _texts(self) -> Iterator[str]:
        """The texts that the tasks pack, in order."""
        for task in self.documents:
            yield from (document.text for document in kept_documents(task))

    def _tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.tokenizer, self.eos_token)


@dataclass(frozen=True)
class DsirTask(StatisticsTask):
    """Log ratios from the target's documents and `num_rows` random sequences of the pool."""

    pool: tuple[PartRef, ...]
    num_rows: int

    def compute(self, store: Store) -> dict[str, NDArray[Any]]:
        """`values`, float64 [NUM_BUCKETS]."""
        raw, wanted = np.zeros(NUM_BUCKETS, np.int64), np.zeros(NUM_BUCKETS, np.int64)
        for text in _sampled_texts(store, self._tokenizer(), self.pool, self.num_rows):
            raw += ngram_counts(text)
        for text in self._texts():
            wanted += ngram_counts(text)
        return {"values": log_ratios(wanted, raw, SMOOTHING)}


@dataclass(frozen=True)
class NgramsTask(StatisticsTask):
    """The word 13-grams of held-out documents, as the tokenizer gives their text back."""

    VERSION = 2

    def compute(self, store: Store) -> dict[str, NDArray[Any]]:
        """`values`, uint64, sorted, unique; `texts`, how many there are and how many too short."""
        tokenizer = self._tokenizer()
        index = NgramIndex.from_texts(
            tokenizer.decode(tokenizer.encode_batch([text])[0]) for text in self._texts()
        )
        return {"values": index.hashes, "texts": np.array([index.num_texts, index.num_short])}


@dataclass(frozen=True)
class OwnFitTask(StatisticsTask):
    """What a user's scorer learns from the target's documents and `num_rows` random sequences."""

    code: OwnCode
    settings: dict[str, Any]
    pip: tuple[str, ...]
    pool: tuple[PartRef, ...]
    num_rows: int

    def compute(self, store: Store) -> dict[str, NDArray[Any]]:
        """Its arrays by name."""
        scorer = self.code.build(self.settings)
        pool = _sampled_texts(store, self._tokenizer(), self.pool, self.num_rows)
        return fit(self.code, scorer, self._texts(), pool)


def _sampled_texts(
    store: Store, tokenizer: Tokenizer, parts: Sequence[PartRef], num_rows: int
) -> Iterator[str]:
    for index, rows in sample_rows(parts, num_rows, 0):
        ids = token_ids(read_table(store.path(parts[index].path), ["input_ids"]))
        yield from (tokenizer.decode(row) for row in ids[rows])


def put_statistics(
    store: Store, name: str, role: str, values: Mapping[str, NDArray[Any]]
) -> Manifest:
    """Keep arrays as the model artifact `name`."""
    content = save(dict(sorted(values.items())))
    return put_folder(
        store,
        name,
        lambda folder: (folder / FILE_NAME).write_bytes(content),
        inputs={},
        settings={},
        totals={"role": role},
    )


def load_arrays(folder: str) -> dict[str, NDArray[Any]]:
    """The arrays that lie in `folder`, by name."""
    return load(read_bytes(join(folder, FILE_NAME)))
