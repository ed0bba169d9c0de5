"""Exact duplicates after normalising, and splits that never part the copies of a text.

Rows are known by 16 bytes of SHA-256: n of them are uint8[n, 16]. Equal hashes have equal leading
bits, so a caller with too many rows for memory treats each `hash_range` alone.
"""

import hashlib
import unicodedata

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint8]


def normalise(text: str) -> str:
    """NFKC, lower case, every run of white space one space, none at the ends."""
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


def document_hash(text: str) -> bytes:
    """The first 16 bytes of SHA-256 over the normalised text; lone surrogates count as they are."""
    return hashlib.sha256(normalise(text).encode(errors="surrogatepass")).digest()[:16]


def later_occurrences(hashes: Hashes) -> NDArray[np.bool_]:
    """True for each row whose hash an earlier row has: uint8[n, 16] -> bool[n]. O(n log n)."""
    upper, lower = _words(hashes)
    order = np.lexsort((lower, upper))  # stable: equal hashes stay in their order
    same = (upper[order][1:] == upper[order][:-1]) & (lower[order][1:] == lower[order][:-1])
    later = np.zeros(len(order), dtype=np.bool_)
    later[order[1:][same]] = True
    return later


def hash_range(hashes: Hashes, num_ranges: int) -> NDArray[np.int64]:
    """Which of `num_ranges` equal ranges of hashes each row falls in: uint8[n, 16] -> int64[n]."""
    leading = _words(hashes)[0] >> np.uint64(32)
    return (leading * np.uint64(num_ranges) >> np.uint64(32)).astype(np.int64)


def heldout_split(hashes: Hashes, share: float, seed: int) -> NDArray[np.bool_]:
    """Hold out about `share` of the texts: uint8[n, 16] -> bool[n], all copies on one side.

    Each text's side depends on its hash and `seed` alone, but for this: of two or more rows at
    least one is held out, and of two or more different texts at least one is not.
    """
    draw = keyed_uniform(_words(hashes)[0], seed)
    if len(draw) < 2:
        return np.zeros(len(draw), dtype=np.bool_)
    held_out = (draw < share) | (draw == draw.min())
    return held_out & ((draw != draw.max()) | (draw.min() == draw.max()))


def keyed_uniform(keys: NDArray[np.uint64], seed: int) -> NDArray[np.float64]:
    """A number in (0, 1) for each (key, seed), the same everywhere: uint64[n] -> float64[n].

    Two rounds of the finaliser of SplitMix64 (Steele, Lea, Flood 2014), 52 bits kept.
    """
    mixed = mix(mix(keys) + _seed_key(seed))
    return ((mixed >> np.uint64(12)).astype(np.float64) + 0.5) / 2.0**52


def _seed_key(seed: int) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:8], "big"))


def mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64: a bijection of uint64 that spreads every bit."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _words(hashes: Hashes) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """The big-endian halves of each hash."""
    words = np.ascontiguousarray(hashes).view(">u8").reshape(-1, 2).astype(np.uint64)
    return words[:, 0], words[:, 1]
