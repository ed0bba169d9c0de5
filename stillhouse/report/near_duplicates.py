"""How many texts of a sample nearly repeat an earlier one, by exact Jaccard similarity.

A text is the set of its 5-word shingles. Two sets whose similarity is at least 4/5 share one of
their rarest ones: of a set of n, of the first n - ceil(4n/5) + 1 in one order of all shingles
(prefix filtering: Chaudhuri, Ganti, Kaushik, ICDE 2006). Only those are looked up.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import chain
from zlib import crc32

WORDS = 5


def near_duplicates(texts: Sequence[str]) -> int:
    """Number of texts whose similarity to an earlier one, that is no repeat itself, is >= 4/5.

    Texts without any word are never repeats.
    """
    sets = [shingles(text) for text in texts]
    counts = Counter(chain.from_iterable(sets))
    holders: defaultdict[int, list[frozenset[int]]] = defaultdict(list)
    repeats = 0
    for mine in sets:
        rarest = sorted(mine, key=lambda shingle: (counts[shingle], shingle))
        prefix = rarest[: len(mine) - -(-4 * len(mine) // 5) + 1]
        if any(_similar(mine, other) for shingle in prefix for other in holders[shingle]):
            repeats += 1
            continue
        for shingle in prefix:
            holders[shingle].append(mine)
    return repeats


def shingles(text: str) -> frozenset[int]:
    """Hashes of all runs of 5 words, in lower case; of the whole text where it has fewer."""
    words = re.findall(r"\w+", text.lower())
    last = max(1, len(words) - WORDS + 1) if words else 0
    runs = (" ".join(words[start : start + WORDS]) for start in range(last))
    return frozenset(crc32(run.encode("utf-8", "replace")) for run in runs)


def _similar(first: frozenset[int], second: frozenset[int]) -> bool:
    return 5 * len(first & second) >= 4 * len(first | second)
