"""Create-only writes: the basis of exactly-once results.

A commit is the creation of a name that did not exist. On S3 that is a conditional put
(If-None-Match: the server refuses the second writer). On local disks the bytes go to
`.name.<uuid>.tmp`, are flushed, and get their final name by `os.link`, which fails where the name
is taken. Some S3 servers and most other filesystems replace a name without a word; so `check_store`
tries once a run whether a second create of one name is refused.
"""

import errno
import hashlib
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from stillhouse.errors import SpecError, StorageError, UnsafeStoreError
from stillhouse.storage.filesystem import (
    absolute_uri,
    filesystem,
    join,
    open_read,
    protocol_of,
    read_bytes,
)
from stillhouse.storage.retries import explain, s3_code, with_retries

_BLOCK = 8 << 20
MARKER = "store.json"
_MARKER_CONTENT = b'{"store_version":1}'
_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS}


def create(uri: str, data: bytes) -> bool:
    """Create `uri` with `data`, never overwriting. One request on S3.

    Returns:
        True if this call made it, False if the name was taken (by anyone, an earlier try of
        ours included: read it back to see whose bytes won).
    """
    if protocol_of(uri) == "file":
        return with_retries(lambda: _create_local(Path(uri), data), f"writing {uri}")
    fs, path = filesystem(uri)
    return with_retries(lambda: _create_remote(fs, path, data, uri), f"writing {uri}")


def create_or_adopt(uri: str, data: bytes) -> bytes:
    """Create `uri` with `data`; where it exists already, return its content instead."""
    return data if create(uri, data) else read_bytes(uri)


def replace(uri: str, data: bytes) -> None:
    """Write `uri`, replacing what was there: only for status pages and caches, never for parts."""
    if protocol_of(uri) == "file":
        path = Path(uri)
        with_retries(lambda: os.replace(_write_beside(path, [data]), path), f"writing {uri}")
        return
    fs, path = filesystem(uri)
    try:
        with_retries(lambda: fs.pipe_file(path, data), f"writing {uri}")
    except FileNotFoundError as error:
        raise StorageError(explain(error, f"writing {uri}")) from error


def copy(source: str, uri: str) -> str:
    """Copy an object of any size, in blocks, to a name that is derived from its content.

    The name appears with the last byte. Replacing another writer's object is harmless, because the
    bytes are the same.

    Returns:
        The sha256 of what was copied.
    """
    return with_retries(lambda: _copy(source, uri), f"copying {source} to {uri}")


def _copy(source: str, uri: str) -> str:
    digest = hashlib.sha256()

    def blocks(file: IO[bytes]) -> Iterator[bytes]:
        while block := file.read(_BLOCK):
            digest.update(block)
            yield block

    with open_read(source) as file:
        if protocol_of(uri) == "file":
            os.replace(_write_beside(Path(uri), blocks(file)), uri)
            _flush_folder(Path(uri).parent)
        else:
            fs, path = filesystem(uri)
            with fs.open(path, "wb") as target:
                target.writelines(blocks(file))
    return digest.hexdigest()


def _create_remote(fs: Any, path: str, data: bytes, uri: str) -> bool:
    try:
        fs.pipe_file(path, data, mode="create")
    except FileExistsError:
        return False
    except FileNotFoundError as error:
        raise StorageError(explain(error, f"writing {uri}")) from error
    except OSError as error:
        # S3's 412 from servers that do not say which condition failed
        if s3_code(error) in {"PreconditionFailed", "412"}:
            return False
        raise
    return True


def _create_local(path: Path, data: bytes) -> bool:
    if path.exists():
        return False
    temporary = _write_beside(path, [data])
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno in _NO_HARD_LINKS:
            raise UnsafeStoreError(
                f"the filesystem of {str(path.parent)!r} has no hard links, so that two writers "
                "could win one name: give a `store` on another disk or on s3://"
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
    _flush_folder(path.parent)
    return True


def _write_beside(path: Path, blocks: Iterable[bytes]) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        message = "a file stands where a folder is needed"
        raise NotADirectoryError(errno.ENOTDIR, message, str(path.parent)) from error
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.writelines(blocks)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _flush_folder(folder: Path) -> None:
    """Make a name durable: after a power cut no receipt may exist whose part's name was lost."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_store(store: str) -> str:
    """Check that a store can be written and that creates in it are exclusive.

    Creates `store.json`: twice the first time, once (refused) ever after.

    Returns:
        The store's absolute URI.

    Raises:
        SpecError: its name has a `#`. StorageError: it cannot be reached or written.
        UnsafeStoreError: two writers could win one name.
    """
    uri = absolute_uri(store)
    if "#" in uri.rsplit("/", 1)[-1]:
        raise SpecError(f"`store: {store}`: a `#` stands before a published name: rename it")
    if protocol_of(uri) == "file" and Path(uri).exists() and not Path(uri).is_dir():
        raise StorageError(f"store {uri!r} is a file, not a folder: give another `store`")
    marker = join(uri, MARKER)
    if create(marker, _MARKER_CONTENT) and create(marker, _MARKER_CONTENT):
        raise UnsafeStoreError(
            f"{protocol_of(uri)}:// lets a second writer replace a name, so {uri!r} cannot be a "
            "store: use an S3 server that knows If-None-Match, or a local folder"
        )
    return uri
