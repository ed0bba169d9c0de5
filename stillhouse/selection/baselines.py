"""What CoLoR-Filter is compared with: random, DSIR and RHO-LOSS, as pure functions.

DSIR (Xie et al. 2023): unigrams and bigrams of words are hashed into buckets; a text's log weight
is the sum over its n-grams of ln p_target(bucket) - ln p_raw(bucket); Gumbel noise on the weights
and the k largest make a draw without replacement. It is a sum, so texts should be of one length.
RHO-LOSS (Mindermann et al. 2022): the largest loss(model) - loss(irreducible).
"""

import hashlib
import re
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from stillhouse.text.duplicates import keyed_uniform

NUM_BUCKETS = 10_000
_TOKEN = re.compile(r"\w+|[^\w\s]+")
_FLOOR = 1e-8  # the reference adds it to both probabilities


def dsir_tokens(text: str) -> list[str]:
    """Lower-cased words and runs of punctuation."""
    return _TOKEN.findall(text.lower())


def ngram_buckets(text: str, num_buckets: int = NUM_BUCKETS) -> NDArray[np.int64]:
    """The bucket of each unigram, then of each bigram: int64[2 * tokens - 1]."""
    tokens = dsir_tokens(text)
    grams = tokens + [f"{a} {b}" for a, b in pairwise(tokens)]
    hashes = (_bucket(gram, num_buckets) for gram in grams)
    return np.fromiter(hashes, dtype=np.int64, count=len(grams))


def ngram_counts(text: str, num_buckets: int = NUM_BUCKETS) -> NDArray[np.int64]:
    """How many n-grams of `text` each bucket gets: int64[num_buckets]; counts of texts add up."""
    return np.bincount(ngram_buckets(text, num_buckets), minlength=num_buckets)


def log_ratios(
    target_counts: NDArray[np.integer], raw_counts: NDArray[np.integer], smoothing: float
) -> NDArray[np.float64]:
    """ln p_target - ln p_raw of each bucket, from counts summed over texts: float64[num_buckets].

    `smoothing` is a pseudo-count for each target bucket (Laplace). The reference's default is 0;
    with a small target take 1, or a bucket it never saw weighs about -18 and decides alone.
    """
    target = target_counts + smoothing
    raw = raw_counts / raw_counts.sum()
    return np.log(target / target.sum() + _FLOOR) - np.log(raw + _FLOOR)


def log_importance(text: str, ratios: NDArray[np.float64]) -> float:
    """DSIR's log weight of a text: the sum of its n-grams' `log_ratios`."""
    return float(ratios[ngram_buckets(text, len(ratios))].sum())


def row_keys(part_fingerprint: str, num_rows: int) -> NDArray[np.uint64]:
    """A key for each row of a part, by what the part holds, not where: uint64[num_rows]."""
    start = int.from_bytes(hashlib.sha256(part_fingerprint.encode()).digest()[:8], "big")
    return np.uint64(start) + np.arange(num_rows, dtype=np.uint64)


def gumbel(keys: NDArray[np.uint64], seed: int) -> NDArray[np.float32]:
    """Gumbel(0, 1) noise, one number for each (key, seed): uint64[n] -> float32[n]."""
    return (-np.log(-np.log(keyed_uniform(keys, seed)))).astype(np.float32)


@lru_cache(maxsize=2**18)
def _bucket(gram: str, num_buckets: int) -> int:
    return (
        int.from_bytes(hashlib.sha256(gram.encode(errors="surrogatepass")).digest(), "big")
        % num_buckets
    )
