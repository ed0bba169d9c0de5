"""JSON objects that carry their own SHA-256, so that any changed byte is found.

>>> data = seal({"rows": 3})
>>> unseal(data, "m")
{'rows': 3}
>>> unseal(data.replace(b"3", b"4"), "m")
Traceback (most recent call last):
    ...
stillhouse.errors.ArtifactError: m is not what was written: restore it, or remove it and run again
"""

import json
from typing import Any

from stillhouse.errors import ArtifactError
from stillhouse.fingerprint import sha256

FORMAT_VERSION = 2
"""Of manifests, receipts and the other JSON of a store; 1 had no digests."""
_FORMAT, _DIGEST = "format_version", "sha256"
_FIX = "restore it, or remove it and run again"


def seal(content: dict[str, Any], indent: int | None = None) -> bytes:
    """The content as JSON with its format version and SHA-256. ValueError for NaN."""
    content = json.loads(json.dumps(content))  # keys as they are read back
    return _sealed(content, FORMAT_VERSION, indent)


def unseal(data: bytes, uri: str) -> dict[str, Any]:
    """The content of a sealed object; objects of format 1 are not checked.

    Raises:
        ArtifactError: not what was written, or of a newer format; the message has `uri`.
    """
    try:
        content: dict[str, Any] = dict(json.loads(data))
        version = int(content.pop(_FORMAT, 1))
        digest = content.pop(_DIGEST, None)
    except (ValueError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{uri} is broken: {error}; {_FIX}") from error
    if version > FORMAT_VERSION:
        raise ArtifactError(
            f"{uri} was written by a newer Stillhouse (format {version}, this one reads "
            f"{FORMAT_VERSION}): upgrade to read it"
        )
    indent = 1 if data.startswith(b"{\n") else None
    if (version > 1 or digest is not None) and _sealed(content, version, indent) != data:
        raise ArtifactError(f"{uri} is not what was written: {_FIX}")
    return content


def is_sealed(data: bytes) -> bool:
    """Whether an object of a store carries a digest; those of format 1 do not."""
    return f'"{_DIGEST}"'.encode() in data


def _sealed(content: dict[str, Any], version: int, indent: int | None) -> bytes:
    def text(value: dict[str, Any], indent: int | None) -> bytes:
        options: dict[str, Any] = {"sort_keys": True, "ensure_ascii": False, "allow_nan": False}
        return json.dumps(value, indent=indent, **options).encode()

    versioned = content | {_FORMAT: version}
    return text(versioned | {_DIGEST: sha256(text(versioned, None))}, indent)
