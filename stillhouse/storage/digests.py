"""Content digests of input files, remembered so that an unchanged listing reads no data.

The identity of an input is the SHA-256 of its bytes. What was seen at `(URI, size, stamp)` is kept
in the store as a cache, one object a listing; it never becomes part of a fingerprint.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from stillhouse.errors import BadFileError
from stillhouse.fingerprint import canonical_json, fingerprint
from stillhouse.storage.artifact import Store
from stillhouse.storage.commit import replace
from stillhouse.storage.filesystem import FileInfo, list_names, open_read, read_bytes

_BLOCK = 8 << 20
_THREADS = 8


@dataclass(frozen=True, slots=True)
class FileDigest:
    """SHA-256 of a file; for Parquet also the rows of each of its row groups."""

    sha256: str
    row_group_rows: tuple[int, ...] | None


def digest_file(uri: str) -> FileDigest:
    """Read a file once and digest it."""
    digest = hashlib.sha256()
    with open_read(uri) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return FileDigest(digest.hexdigest(), _row_groups(uri))


def _row_groups(uri: str) -> tuple[int, ...] | None:
    """Rows of each row group; None for other formats and for files that cannot be read."""
    if not uri.lower().endswith((".parquet", ".pq")):
        return None
    with open_read(uri) as file:
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

    Args:
        store: where the cache lies.
        files: the listing.
        remember: write the cache (not for `plan`, which writes nothing).
        run: maps `digest_file` over URIs; default a few threads.

    Raises:
        BadFileError: a file vanished while it was read.
    """
    folder = store.path("cache", fingerprint(sorted({f.uri.rsplit("/", 1)[0] for f in files})))
    name = fingerprint([[f.uri, f.size_bytes, f.stamp] for f in files]) + ".json"
    names = list_names(folder)
    known = _load(folder, [name] if name in names else names)
    keys = [f"{f.uri}\n{f.size_bytes}\n{f.stamp}" for f in files]
    missing = [(k, f.uri) for k, f in zip(keys, files, strict=True) if k not in known]
    try:
        with ThreadPoolExecutor(_THREADS) as threads:
            made = list((run or threads.map)(digest_file, [uri for _, uri in missing]))
    except FileNotFoundError as error:
        raise BadFileError(f"{error} vanished while it was read") from error
    known |= {key: digest for (key, _), digest in zip(missing, made, strict=True)}
    found = [known[key] for key in keys]
    if remember and name not in names:
        content = {k: [d.sha256, d.row_group_rows] for k, d in zip(keys, found, strict=True)}
        replace(f"{folder}/{name}", canonical_json(content))
    return found


def _load(folder: str, names: list[str]) -> dict[str, FileDigest]:
    known: dict[str, FileDigest] = {}
    for name in names:
        for key, (digest, rows) in json.loads(read_bytes(f"{folder}/{name}")).items():
            known[key] = FileDigest(digest, None if rows is None else tuple(rows))
    return known
