"""Commit = creating a name that nobody has. This page is the whole exactly-once story.

On S3 a conditional put (If-None-Match: the server refuses the second writer). On local disks the
bytes go to `name.<uuid>`, are flushed, and `os.link` gives them their final name, which fails
when it is taken. Any other filesystem is probed once: if a second create of one name succeeds,
the store is refused.
"""

import os
import uuid
from functools import cache
from pathlib import Path
from typing import Any

from stillhouse.errors import StorageError, UnsafeStoreError
from stillhouse.storage.filesystem import (
    absolute_uri,
    filesystem,
    join,
    protocol_of,
    read_bytes,
    with_retries,
)

_CONDITIONAL = {"s3", "s3a"}


def create(uri: str, data: bytes) -> bool:
    """Create `uri` with `data`, never overwriting.

    Returns:
        True if this call made it, False if the name was taken (by anyone, an earlier try of
        ours included: read it back to see whose bytes won).
    """
    if protocol_of(uri) == "file":
        return with_retries(lambda: _create_local(Path(uri), data), f"writing {uri}")
    fs, path = filesystem(uri)

    def put() -> bool:
        try:
            fs.pipe_file(path, data, mode="create")
        except FileExistsError:
            return False
        return True

    return with_retries(put, f"writing {uri}")


def create_or_adopt(uri: str, data: bytes) -> bytes:
    """Create `uri`; where it exists already, return the bytes that stand there instead."""
    return data if create(uri, data) else read_bytes(uri)


def replace(uri: str, data: bytes) -> None:
    """Write `uri`, replacing what was there: only for status pages and caches, never for parts."""
    if protocol_of(uri) == "file":
        with_retries(lambda: _replace_local(Path(uri), data), f"writing {uri}")
        return
    fs, path = filesystem(uri)
    with_retries(lambda: fs.pipe_file(path, data), f"writing {uri}")


def _write_beside(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _create_local(path: Path, data: bytes) -> bool:
    if path.exists():
        return False
    temporary = _write_beside(path, data)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _replace_local(path: Path, data: bytes) -> None:
    os.replace(_write_beside(path, data), path)


def check_store(store: str) -> str:
    """Make sure that a store can be written and that its creates are exclusive.

    Returns:
        The store's absolute URI.

    Raises:
        StorageError: it cannot be written. UnsafeStoreError: two writers could win one name.
    """
    uri = absolute_uri(store)
    if protocol_of(uri) == "file":
        _check_local(Path(uri))
    elif protocol_of(uri) not in _CONDITIONAL:
        _probe(uri)
    return uri


def _check_local(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise StorageError(f"store {str(path)!r} is a file, not a folder: give another `store`")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"store {str(path)!r} cannot be made: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise StorageError(f"store {str(path)!r} is not writable: give another `store`")


@cache
def _probe(store: str) -> None:
    fs, root = filesystem(store)
    probe = join(store, f".probe-{uuid.uuid4().hex}")
    first, second = create(probe, b"1"), create(probe, b"2")
    _remove_quietly(fs, root + probe[len(store) :])
    if not first or second:
        raise UnsafeStoreError(
            f"{protocol_of(store)}:// lets a second writer replace a name, so {store!r} cannot be "
            "a store; use s3:// or a local folder"
        )


def _remove_quietly(fs: Any, path: str) -> None:
    try:
        fs.rm_file(path)
    except OSError:
        return
