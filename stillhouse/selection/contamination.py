"""Texts that share word 13-grams with held-out text or with benchmarks.

The usual rule of decontamination (GPT-3, appendix C).

Words are runs of `\\w` in lower case. A word is hashed once to 64 bits, an n-gram is a polynomial
of its words' hashes modulo 2**64, computed for all positions at once.
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stillhouse.selection.scorers import (
    Arrays,
    FitTask,
    TextScorer,
    document_tokens,
    piece_scores,
)
from stillhouse.storage.artifact import Store
from stillhouse.text.pieces import read_pieces, token_ids
from stillhouse.text.tasks import PackTask, kept_documents
from stillhouse.text.tokenizer import Tokenizer

NUM_WORDS = 13
MIN_WORDS = 8
_WORD = re.compile(r"\w+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def word_ngrams(text: str, n: int = NUM_WORDS) -> NDArray[np.uint64]:
    """Hashes of all runs of `n` words, in order, repeated ones included: uint64[words - n + 1].

    A shorter text of at least `MIN_WORDS` words is one gram as a whole, a still shorter one none.
    """
    words = _WORD.findall(text.lower())
    length = min(n, len(words))
    if length < min(n, MIN_WORDS):
        return np.zeros(0, dtype=np.uint64)
    hashes = np.fromiter(map(_word_hash, words), dtype=np.uint64, count=len(words))
    num_grams = len(words) - length + 1
    grams = np.full(num_grams, length, dtype=np.uint64)
    for offset in range(length):
        grams = grams * _FACTOR + hashes[offset : offset + num_grams]
    return grams


@dataclass(frozen=True, slots=True)
class NgramIndex:
    """The n-grams of a collection of texts: `hashes` uint64, sorted, unique.

    Of its `num_texts`, `num_short` have fewer than n words: they are never found inside others.
    """

    hashes: NDArray[np.uint64]
    n: int = NUM_WORDS
    num_texts: int = 0
    num_short: int = 0

    @classmethod
    def from_texts(cls, texts: Iterable[str], n: int = NUM_WORDS) -> "NgramIndex":
        grams = [np.zeros(0, dtype=np.uint64)]
        num_short = 0
        for text in texts:
            grams.append(word_ngrams(text, n))
            num_short += len(_WORD.findall(text)) < n
        return cls(np.unique(np.concatenate(grams)), n, len(grams) - 1, num_short)

    def hits(self, text: str) -> int:
        """How many different n-grams of `text` are in the index."""
        return len(self.places(text))

    def places(self, text: str) -> NDArray[np.int64]:
        """Where in `hashes` the different n-grams of `text` are, those in the index."""
        if not len(self.hashes):
            return np.zeros(0, np.int64)
        grams = np.unique(word_ngrams(text, self.n))
        nearest = np.searchsorted(self.hashes, grams).clip(max=len(self.hashes) - 1)
        return nearest[self.hashes[nearest] == grams]


@dataclass(frozen=True)
class NgramsTask(FitTask):
    """The word 13-grams of held-out documents, as the tokenizer gives their text back."""

    VERSION = 2

    def fit(self, store: Store) -> Arrays:
        """`values`, the hashes; `texts`, how many there are and how many of them are short."""
        index = self.index(self.load_tokenizer(), self.texts())
        return {"values": index.hashes, "texts": np.array([index.num_texts, index.num_short])}

    def index(self, tokenizer: Tokenizer, texts: Iterable[str]) -> NgramIndex:
        decoded = (tokenizer.decode(tokenizer.encode_batch([text])[0]) for text in texts)
        return NgramIndex.from_texts(decoded)


@dataclass(frozen=True)
class BenchmarksTask(NgramsTask):
    """The same of the files of benchmarks, which are numbered from 1 (`files_of`)."""

    def fit(self, store: Store) -> Arrays:
        """`files`: of each of the `values`, the first file that has it; `texts` of all files."""
        tokenizer = self.load_tokenizer()
        texts: dict[str, list[str]] = {digest: [] for digest in files_of(self.documents)}
        for task in self.documents:
            for document in kept_documents(task):
                texts[task.unit.files[document.file].digest].append(document.text)
        found = [self.index(tokenizer, of) for of in texts.values()]
        sizes = [len(index.hashes) for index in found]
        numbers = np.repeat(np.arange(1, len(found) + 1, dtype=np.int32), sizes)
        hashes = np.concatenate([index.hashes for index in found])
        values, first = np.unique(hashes, return_index=True)
        counts = np.array([sum(i.num_texts for i in found), sum(i.num_short for i in found)])
        return {"values": values, "files": numbers[first], "texts": counts}


def files_of(tasks: Iterable[PackTask]) -> dict[str, str]:
    """The different files that some tasks read, in order: their URIs by digest."""
    found: dict[str, str] = {}
    for file in (file for task in tasks for file in task.unit.files):
        found.setdefault(file.digest, file.uri)
    return found


class ContaminationScorer(TextScorer):
    """1 where a sequence holds a document that shares word 13-grams with held-out text, else 0.

    With benchmarks the number of the file, the smallest one where it shares some with several.
    """

    def score(self, tokens: pa.Table) -> pa.Table:
        """All pieces of a document in the part are read as one text.

        `piece_tokens` holds the tokens of the pieces whose document is contaminated, else 0.
        """
        index, files = NgramIndex(self.arrays["values"]), self.arrays.get("files")
        pieces = read_pieces(tokens)
        values = np.zeros(tokens.num_rows, np.float32)
        flagged = np.zeros(len(pieces.start), np.int32)
        for first, last, ids in document_tokens(token_ids(tokens), pieces):
            places = index.places(self.tokenizer.decode(ids))
            if len(places):
                number = 1 if files is None else files[places].min()
                rows = np.unique(pieces.sequence[first:last])
                values[rows] = np.where(values[rows] > 0, np.minimum(values[rows], number), number)
                flagged[first:last] = pieces.num_tokens[first:last]
        return piece_scores(values, pieces, None, flagged)


@lru_cache(maxsize=2**17)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big")
