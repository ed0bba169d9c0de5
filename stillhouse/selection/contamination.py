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
from numpy.typing import NDArray

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
    """The n-grams of a collection of texts: `hashes` uint64, sorted, unique; 8 bytes each.

    Of its `num_texts`, `num_short` have fewer than n words: they are never found inside others.
    """

    hashes: NDArray[np.uint64]
    n: int = NUM_WORDS
    num_texts: int = 0
    num_short: int = 0

    @classmethod
    def from_texts(cls, texts: Iterable[str], n: int = NUM_WORDS) -> "NgramIndex":
        """The index of all n-grams of `texts`."""
        grams = [np.zeros(0, dtype=np.uint64)]
        num_short = 0
        for text in texts:
            grams.append(word_ngrams(text, n))
            num_short += len(_WORD.findall(text)) < n
        return cls(np.unique(np.concatenate(grams)), n, len(grams) - 1, num_short)

    def hits(self, text: str) -> int:
        """How many different n-grams of `text` the index has."""
        if not len(self.hashes):
            return 0
        grams = np.unique(word_ngrams(text, self.n))
        nearest = np.searchsorted(self.hashes, grams).clip(max=len(self.hashes) - 1)
        return int((self.hashes[nearest] == grams).sum())


@lru_cache(maxsize=2**17)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big")
