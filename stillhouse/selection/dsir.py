"""DSIR (Xie et al. 2023): importance weights from hashed n-grams.

Unigrams and bigrams of words are hashed into buckets; a text's log weight is the sum over its
n-grams of ln p_target(bucket) - ln p_raw(bucket); Gumbel noise on the weights and the k largest
make a draw without replacement. It is a sum, so texts should be of one length.
"""

import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stillhouse.selection.scorers import Arrays, FitTask, TextScorer, plain_scores
from stillhouse.storage.artifact import PartRef, Store
from stillhouse.text.duplicates import keyed_uniform
from stillhouse.text.pieces import token_ids

NUM_BUCKETS = 10_000
_SMOOTHING = 1.0
"""Laplace pseudo-count: without it a bucket that a small target lacks (about -18) decides alone."""
_TOKEN = re.compile(r"\w+|[^\w\s]+")
_FLOOR = 1e-8  # the reference adds it to both probabilities


def ngram_buckets(text: str, num_buckets: int = NUM_BUCKETS) -> NDArray[np.int64]:
    """The bucket of each unigram, then of each bigram: int64[2 * tokens - 1].

    Tokens are lower-cased words and runs of punctuation.
    """
    tokens = _TOKEN.findall(text.lower())
    grams = tokens + [f"{a} {b}" for a, b in pairwise(tokens)]
    hashes = (_bucket(gram, num_buckets) for gram in grams)
    return np.fromiter(hashes, dtype=np.int64, count=len(grams))


def ngram_counts(text: str, num_buckets: int = NUM_BUCKETS) -> NDArray[np.int64]:
    """How many n-grams of `text` fall into each bucket: int64[num_buckets]."""
    return np.bincount(ngram_buckets(text, num_buckets), minlength=num_buckets)


def log_ratios(
    target_counts: NDArray[np.integer], raw_counts: NDArray[np.integer], smoothing: float
) -> NDArray[np.float64]:
    """ln p_target - ln p_raw of each bucket, from counts summed over texts: float64[num_buckets].

    `smoothing` is a pseudo-count for each target bucket; the reference's default is 0.
    """
    target = target_counts + smoothing
    raw = raw_counts / raw_counts.sum()
    return np.log(target / target.sum() + _FLOOR) - np.log(raw + _FLOOR)


def log_importance(text: str, ratios: NDArray[np.float64]) -> float:
    """The log weight of a text: the sum of its n-grams' `log_ratios`."""
    return float(ratios[ngram_buckets(text, len(ratios))].sum())


def gumbel(keys: NDArray[np.uint64], seed: int) -> NDArray[np.float32]:
    """Gumbel(0, 1) noise, one number for each (key, seed): uint64[n] -> float32[n]."""
    return (-np.log(-np.log(keyed_uniform(keys, seed)))).astype(np.float32)


@dataclass(frozen=True)
class DsirTask(FitTask):
    """Log ratios from the target's documents and `num_rows` random sequences of the pool."""

    pool: tuple[PartRef, ...]
    num_rows: int

    def fit(self, store: Store) -> Arrays:
        """`values`, float64 [NUM_BUCKETS]."""
        raw, target = np.zeros(NUM_BUCKETS, np.int64), np.zeros(NUM_BUCKETS, np.int64)
        for text in self.sampled_texts(store, self.pool, self.num_rows):
            raw += ngram_counts(text)
        for text in self.texts():
            target += ngram_counts(text)
        return {"values": log_ratios(target, raw, _SMOOTHING)}


class DsirScorer(TextScorer):
    """Log importance weight of a sequence's text; larger is more like the target."""

    def score(self, tokens: pa.Table) -> pa.Table:
        texts = map(self.tokenizer.decode, token_ids(tokens))
        ratios = self.arrays["values"]
        return plain_scores(np.array([log_importance(text, ratios) for text in texts], np.float32))


@lru_cache(maxsize=2**18)
def _bucket(gram: str, num_buckets: int) -> int:
    digest = hashlib.sha256(gram.encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest, "big") % num_buckets
