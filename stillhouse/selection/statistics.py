"""Statistics of text that a scorer without a network is made from, kept like a model.

DSIR's log ratios of hashed n-grams (target against pool), and the word 13-grams of the held-out
text that contaminated documents are found with, one array each, and whatever arrays a user's
scorer learned: as safetensors.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from stillhouse.text.documents import Document
from stillhouse.text.pieces import token_ids
from stillhouse.text.tasks import PackTask, kept_documents
from stillhouse.text.tokenizer import Tokenizer, load_tokenizer

FILE_NAME = "statistics.safetensors"
SMOOTHING = 1.0
"""Laplace pseudo-count: without it a bucket that a small target lacks decides by itself."""


@dataclass(frozen=True, slots=True)
class DsirTask:
    """Log ratios from the target's documents and `num_rows` random sequences of the pool."""

    store: Store
    tokenizer: str
    eos_token: str
    target: tuple[PackTask, ...]
    pool: tuple[PartRef, ...]
    num_rows: int

    def compute(self) -> NDArray[np.float64]:
        """float64 [NUM_BUCKETS]."""
        tokenizer = load_tokenizer(self.tokenizer, self.eos_token)
        raw = np.zeros(NUM_BUCKETS, np.int64)
        for text in _sampled_texts(self.store, tokenizer, self.pool, self.num_rows, 0):
            raw += ngram_counts(text)
        wanted = np.zeros(NUM_BUCKETS, np.int64)
        for document in _documents(self.target):
            wanted += ngram_counts(document.text)
        return log_ratios(wanted, raw, SMOOTHING)


@dataclass(frozen=True, slots=True)
class NgramsTask:
    """The word 13-grams of held-out documents, as the tokenizer gives their text back."""

    tokenizer: str
    eos_token: str
    heldout: tuple[PackTask, ...]

    def compute(self) -> dict[str, NDArray[Any]]:
        """`values`, uint64, sorted, unique; `texts`, how many there are and how many too short."""
        tokenizer = load_tokenizer(self.tokenizer, self.eos_token)
        texts = (document.text for document in _documents(self.heldout))
        index = NgramIndex.from_texts(
            tokenizer.decode(tokenizer.encode_batch([text])[0]) for text in texts
        )
        return {"values": index.hashes, "texts": np.array([index.num_texts, index.num_short])}


@dataclass(frozen=True, slots=True)
class OwnFitTask:
    """What a user's scorer learns from the target's documents and `num_rows` random sequences."""

    code: OwnCode
    settings: dict[str, Any]
    store: Store
    tokenizer: str
    eos_token: str
    target: tuple[PackTask, ...]
    pool: tuple[PartRef, ...]
    num_rows: int

    def compute(self) -> dict[str, NDArray[Any]]:
        """Its arrays by name."""
        tokenizer = load_tokenizer(self.tokenizer, self.eos_token)
        return fit(
            self.code,
            self.code.build(self.settings),
            (document.text for document in _documents(self.target)),
            _sampled_texts(self.store, tokenizer, self.pool, self.num_rows, 0),
        )


def compute_statistics(task: DsirTask | NgramsTask | OwnFitTask) -> dict[str, NDArray[Any]]:
    """What a task computes, by name; a function that a worker can be sent."""
    found = task.compute()
    return found if isinstance(found, dict) else {"values": found}


def _sampled_texts(
    store: Store, tokenizer: Tokenizer, parts: Sequence[PartRef], num_rows: int, seed: int
) -> Iterator[str]:
    for index, rows in sample_rows(parts, num_rows, seed):
        ids = token_ids(read_table(store.path(parts[index].path), ["input_ids"]))
        yield from (tokenizer.decode(row) for row in ids[rows])


def _documents(tasks: Iterable[PackTask]) -> Iterator[Document]:
    """The documents that these tasks pack, in order."""
    for task in tasks:
        yield from kept_documents(task)


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
