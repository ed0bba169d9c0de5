"""How many texts of a sample nearly repeat an earlier one: MinHash, then exact Jaccard.

A text is the set of its 5-word shingles. Texts whose signatures agree in a whole band are
candidates (Broder 1997; Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, section 3.4);
a candidate counts if the two sets' Jaccard similarity is at least 0.8. With 16 bands of 4 values
a pair at 0.8 is found with probability 1 - (1 - 0.8^4)^16 = 0.9998.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

WORDS = 5
SIMILARITY = 0.8
BANDS, ROWS = 16, 4
_PRIME = np.uint64(2**32 + 15)
"""The first prime above the 32-bit hashes, so that a product with a < 2^31 fits 64 bits."""


@dataclass(frozen=True, slots=True)
class NearDuplicates:
    """Of `num_texts` texts, `num_repeats` are near-duplicates of an earlier one."""

    num_texts: int
    num_repeats: int

    @property
    def share(self) -> float:
        """Repeats per text; 0 for an empty sample."""
        return self.num_repeats / self.num_texts if self.num_texts else 0.0


def near_duplicates(texts: Sequence[str]) -> NearDuplicates:
    """Count near-duplicates among `texts`; time and memory grow with their number of words.

    Texts without any word are never repeats. The count depends on the order only where
    similarity is not transitive.
    """
    signer = _Signer()
    buckets: defaultdict[tuple[int, bytes], list[int]] = defaultdict(list)
    sets: list[frozenset[int]] = []
    repeats = 0
    for index, text in enumerate(texts):
        sets.append(shingles(text))
        if not sets[index]:
            continue
        bands = signer.bands(sets[index])
        earlier = {other for band in bands for other in buckets[band]}
        if any(_jaccard(sets[index], sets[other]) >= SIMILARITY for other in earlier):
            repeats += 1
            continue
        for band in bands:
            buckets[band].append(index)
    return NearDuplicates(len(texts), repeats)


def shingles(text: str) -> frozenset[int]:
    """Hashes of all runs of 5 words, in lower case; of the whole text where it has fewer."""
    words = re.findall(r"\w+", text.lower())
    last = max(1, len(words) - WORDS + 1) if words else 0
    runs = (" ".join(words[start : start + WORDS]) for start in range(last))
    return frozenset(crc32(run.encode("utf-8", "replace")) for run in runs)


class _Signer:
    """MinHash with fixed hash functions (a x + b) mod p."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self._a = rng.integers(1, 2**31, (BANDS * ROWS, 1), dtype=np.uint64)
        self._b = rng.integers(0, 2**31, (BANDS * ROWS, 1), dtype=np.uint64)

    def bands(self, values: frozenset[int]) -> list[tuple[int, bytes]]:
        """The signature's bands, each a key that similar sets are likely to share."""
        hashes: NDArray[np.uint64] = np.fromiter(values, np.uint64, len(values))
        signature = ((self._a * hashes + self._b) % _PRIME).min(axis=1).reshape(BANDS, ROWS)
        return [(band, signature[band].tobytes()) for band in range(BANDS)]


def _jaccard(first: frozenset[int], second: frozenset[int]) -> float:
    return len(first & second) / len(first | second)
