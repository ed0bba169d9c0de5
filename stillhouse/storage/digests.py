"""Content digests of input files, cached so that an unchanged listing reads no data.

An input is identified by the SHA-256 of its bytes. The digest that a file of some URI, size and
stamp had is cached in the store; the cache is never part of a fingerprint.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

from stillhouse.errors import ArtifactError, BadFileError
from stillhouse.fingerprint import fingerprint
from stillhouse.storage.artifact import Store
from stillhouse.storage.commit import replace
from stillhouse.storage.filesystem import FileInfo, open_read, read_bytes
from stillhouse.storage.sealed import seal, unseal
from stillhouse.text.formats import function_of, pieces_of

_BLOCK = 8 << 20
_THREADS = 8
LARGE_BYTES = 8 << 30
"""More than this is read on the cluster."""
_TASK_BYTES, _TASK_FILES = 1 << 30, 1000
"""Of the files that one task reads."""


@dataclass(frozen=True, slots=True)
class FileDigest:
    """SHA-256 of a file, and the rows of each of its pieces (`RowFormat.pieces`)."""

    sha256: str
    piece_rows: tuple[int, ...] | None


def digest_file(uri: str) -> FileDigest:
    """Read a file once and digest it.

    Raises:
        BadFileError: it vanished since it was listed.
    """
    digest = hashlib.sha256()
    try:
        with open_read(uri) as file:
            while block := file.read(_BLOCK):
                digest.update(block)
            return FileDigest(digest.hexdigest(), _piece_rows(uri, file))
    except FileNotFoundError as error:
        raise BadFileError(f"{uri} vanished while it was read") from error


def _digest_all(uris: Sequence[str]) -> list[FileDigest]:
    return [digest_file(uri) for uri in uris]


def _batches(files: Sequence[FileInfo]) -> Iterator[list[str]]:
    """The URIs of files in batches for a task each."""
    batch: list[str] = []
    size = 0
    for file in files:
        if batch and (size + file.size_bytes > _TASK_BYTES or len(batch) == _TASK_FILES):
            yield batch
            batch, size = [], 0
        batch.append(file.uri)
        size += file.size_bytes
    if batch:
        yield batch


def _unread_digest(file: FileInfo) -> FileDigest:
    """A placeholder that no content has, with the rows of its pieces."""
    rows = None
    if pieces_of(file.uri) is not None:
        with open_read(file.uri) as opened:
            rows = _piece_rows(file.uri, opened)
    return FileDigest(fingerprint(["unread", file.uri, file.size_bytes, file.stamp]), rows)


def _piece_rows(uri: str, file: IO[bytes]) -> tuple[int, ...] | None:
    """Rows of each piece; None for formats without pieces and for files that cannot be read."""
    pieces = pieces_of(uri)
    if pieces is None:
        return None
    file.seek(0)
    return function_of(pieces)(file)


def digest_files(
    store: Store, files: Sequence[FileInfo], *, remember: bool = True
) -> list[FileDigest]:
    """The digests of `files`, from the store's cache where size and stamp are unchanged.

    Costs two requests besides the files that are read: the cache is one object for all files under
    one root. Of two racing runs the last one's cache stays; what only the other read is read again.

    Args:
        store: where the cache lies.
        files: the listing.
        remember: read new files (many gigabytes by `store.map_large`) and update the cache. False
            is for `plan`: nothing is written, of new files only the metadata of pieces; their
            digests are placeholders and their URIs are added to `store.unread`.

    Raises:
        BadFileError: a file vanished while it was read.
    """
    cache = store.path("cache", fingerprint(["digests", 1, _common_root(files)]) + ".json")
    known: dict[str, list[Any]] = {}  # by URI: size, stamp, sha256, rows of the pieces
    with suppress(FileNotFoundError, ArtifactError):  # a damaged cache is as good as none
        known = unseal(read_bytes(cache), cache)
    missing = [f for f in files if known.get(f.uri, [])[:2] != [f.size_bytes, f.stamp]]
    size = sum(file.size_bytes for file in missing)
    if remember and size > LARGE_BYTES and store.map_large is not None:
        found = store.map_large(_digest_all, _batches(missing))
        digests = [digest for digests in found for digest in digests]
    else:
        with ThreadPoolExecutor(_THREADS) as threads:
            if remember:
                digests = list(threads.map(digest_file, [f.uri for f in missing]))
            else:
                store.unread.extend(f.uri for f in missing)
                digests = list(threads.map(_unread_digest, missing))
    for file, digest in zip(missing, digests, strict=True):
        known[file.uri] = [file.size_bytes, file.stamp, digest.sha256, digest.piece_rows]
    if remember and missing:
        replace(cache, seal(known))
    entries = [known[file.uri][2:] for file in files]
    return [FileDigest(sha256, None if rows is None else tuple(rows)) for sha256, rows in entries]


def _common_root(files: Sequence[FileInfo]) -> str:
    """The deepest folder over all files; it stays as shards and subfolders are added."""
    folders = {f"/{f.uri.replace('://', '/').lstrip('/')}".rsplit("/", 1)[0] for f in files}
    return os.path.commonpath(folders) if folders else ""
