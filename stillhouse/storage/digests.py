"""Content digests of input files, remembered so that an unchanged listing reads no data.

The identity of an input is the SHA-256 of its bytes. What was seen at `(URI, size, stamp)` is kept
in the store as a cache; it never becomes part of a fingerprint.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from stillhouse.errors import ArtifactError, BadFileError
from stillhouse.fingerprint import fingerprint
from stillhouse.storage.artifact import Store
from stillhouse.storage.commit import replace
from stillhouse.storage.filesystem import FileInfo, open_read, read_bytes
from stillhouse.storage.sealed import seal, unseal

_BLOCK = 8 << 20
_THREADS = 8


@dataclass(frozen=True, slots=True)
class FileDigest:
    """SHA-256 of a file; for Parquet also the rows of each of its row groups."""

    sha256: str
    row_group_rows: tuple[int, ...] | None


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
            return FileDigest(digest.hexdigest(), _row_groups(uri, file))
    except FileNotFoundError as error:
        raise BadFileError(f"{uri} vanished while it was read") from error


def _without_reading(file: FileInfo) -> FileDigest:
    """A name that no content has, and the rows that a footer tells of."""
    rows = None
    if _has_footer(file.uri):
        with open_read(file.uri) as opened:
            rows = _row_groups(file.uri, opened)
    return FileDigest(fingerprint(["unread", file.uri, *_seen(file)]), rows)


def _has_footer(uri: str) -> bool:
    return uri.lower().endswith((".parquet", ".pq"))


def _row_groups(uri: str, file: IO[bytes]) -> tuple[int, ...] | None:
    """Rows of each row group; None for other formats and for files that cannot be read."""
    if not _has_footer(uri):
        return None
    file.seek(0)
    try:
        footer = pq.ParquetFile(file).metadata
    except (pa.ArrowInvalid, OSError):
        return None
    return tuple(footer.row_group(i).num_rows for i in range(footer.num_row_groups))


def digest_files(
    store: Store,
    files: Sequence[FileInfo],
    *,
    remember: bool = True,
    run: Callable[[Callable[[str], FileDigest], Iterable[str]], Iterable[FileDigest]] | None = None,
) -> list[FileDigest]:
    """The digests of `files`, from the store's cache where size and stamp are unchanged.

    Two requests besides the files that are read: the cache is one object for all files under
    one root, read and, where something is new, replaced (a racing run's news are read again).

    Args:
        store: where the cache lies.
        files: the listing.
        remember: read what is new and write the cache. Without it, for `plan`, nothing is written
            and of new files only Parquet's footers are read: they get names that no content has,
            and are told to `store.unread`.
        run: maps `digest_file` over URIs; default a few threads.

    Raises:
        BadFileError: a file vanished while it was read.
    """
    cache = store.path("cache", fingerprint(["digests", 1, _common_root(files)]) + ".json")
    known = _load(cache)
    missing = [f for f in files if f.uri not in known or known[f.uri][:2] != _seen(f)]
    with ThreadPoolExecutor(_THREADS) as threads:
        if remember:
            made = list((run or threads.map)(digest_file, [f.uri for f in missing]))
        else:
            store.unread.extend(f.uri for f in missing)
            made = list(threads.map(_without_reading, missing))
    for file, digest in zip(missing, made, strict=True):
        known[file.uri] = [*_seen(file), digest.sha256, digest.row_group_rows]
    if remember and missing:
        replace(cache, seal(known))
    return [_digest(known[f.uri]) for f in files]


def _seen(file: FileInfo) -> list[Any]:
    return [file.size_bytes, file.stamp]


def _digest(entry: list[Any]) -> FileDigest:
    _, _, sha256, rows = entry
    return FileDigest(sha256, None if rows is None else tuple(rows))


def _common_root(files: Sequence[FileInfo]) -> str:
    """The deepest folder over all files; it stays as shards and subfolders are added."""
    folders = {f"/{f.uri.replace('://', '/').lstrip('/')}".rsplit("/", 1)[0] for f in files}
    return os.path.commonpath(folders) if folders else ""


def _load(uri: str) -> dict[str, list[Any]]:
    """By URI of a file: size, stamp, sha256, rows of its row groups."""
    try:
        return unseal(read_bytes(uri), uri)
    except (FileNotFoundError, ArtifactError):
        return {}  # a cache that is not what was written says nothing
