"""Texts that share word 13-grams with held-out text (the usual decontamination rule, GPT-3 app. C).

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
        if not len(self.hashes):
            return 0
        grams = np.unique(word_ngrams(text, self.n))
        nearest = np.searchsorted(self.hashes, grams).clip(max=len(self.hashes) - 1)
        return int((self.hashes[nearest] == grams).sum())


@dataclass(frozen=True)
class NgramsTask(FitTask):
    """The word 13-grams of held-out documents, as the tokenizer gives their text back."""

    VERSION = 2

    def fit(self, store: Store) -> Arrays:
        """`values`, the hashes; `texts`, how many there are and how many of them are short."""
        tokenizer = self.load_tokenizer()
        texts = (tokenizer.decode(tokenizer.encode_batch([text])[0]) for text in self.texts())
        index = NgramIndex.from_texts(texts)
        return {"values": index.hashes, "texts": np.array([index.num_texts, index.num_short])}


class ContaminationScorer(TextScorer):
    """1 where a sequence holds a document that shares word 13-grams with held-out text, else 0."""

    def score(self, tokens: pa.Table) -> pa.Table:
        """All pieces of a document in the part are read as one text.

        `piece_tokens` holds the tokens of the pieces whose document is contaminated, else 0.
        """
        index = NgramIndex(self.arrays["values"])
        pieces = read_pieces(tokens)
        values = np.zeros(tokens.num_rows, np.float32)
        flagged = np.zeros(len(pieces.start), np.int32)
        for first, last, ids in document_tokens(token_ids(tokens), pieces):
            if index.hits(self.tokenizer.decode(ids)):
                values[pieces.sequence[first:last]] = 1.0
                flagged[first:last] = pieces.num_tokens[first:last]
        return piece_scores(values, pieces, None, flagged)


@lru_cache(maxsize=2**17)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big")
