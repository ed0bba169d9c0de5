"""Identity of everything Stillhouse makes: full SHA-256 over canonical JSON.

    >>> fingerprint({"b": 1, "a": [1.5, None]}) == fingerprint({"a": [1.5, None], "b": 1})
    True
    >>> len(fingerprint("x")), short(fingerprint("x"))
    (64, 'ba2df4903a2c')

`short` is for messages only; keys and file names are always the full digest.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys and no spaces; NaN and infinities are refused (ValueError)."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def sha256(data: bytes) -> str:
    """The hexadecimal SHA-256."""
    return hashlib.sha256(data).hexdigest()


def fingerprint(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value` (dicts, lists, strings, numbers, None)."""
    return sha256(canonical_json(value))


def short(digest: str) -> str:
    return digest[:12]


def content_batches(names: Sequence[str], most: int) -> list[range]:
    """Cut a sequence of things, given by their fingerprints, into batches of at most `most`.

    A batch has at least a quarter of that and ends where a name says so. So what is added in one
    place changes the batches there, and the others stay what they were.
    """
    batches: list[range] = []
    start = 0
    for index, name in enumerate(names):
        size = index + 1 - start
        if size == most or (size * 4 >= most and int(name[:8], 16) * most < 4 * 2**32):
            batches.append(range(start, index + 1))
            start = index + 1
    return [*batches, range(start, len(names))] if start < len(names) else batches
