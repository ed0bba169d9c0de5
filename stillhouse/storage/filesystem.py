"""Every byte goes through here: URIs to fsspec filesystems, listing, reading, retrying.

A path without a scheme is a local path; URIs made from it are absolute, so that any process on
the machine reads the same file. Options of a filesystem (endpoint, profile) live in fsspec's own
configuration, credentials in the standard chains; neither is ever written down.
"""

import errno
import json
import os
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import fsspec  # pyright: ignore[reportMissingTypeStubs]
from fsspec.config import conf as fsspec_conf  # pyright: ignore[reportMissingTypeStubs]

from stillhouse.errors import InputError, StillhouseError, StorageError
from stillhouse.fingerprint import fingerprint

T = TypeVar("T")
_MAX_TRIES = 6
_FINAL = {errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL}


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One listed file: `stamp` is its etag or modification time, whatever tells a change."""

    uri: str
    name: str
    size_bytes: int
    stamp: str


def absolute_uri(uri: str) -> str:
    """The URI with local paths made absolute and `file://` taken off; others unchanged."""
    if uri.startswith("file://"):
        uri = uri[len("file://") :]
    return uri.rstrip("/") if "://" in uri else str(Path(uri).expanduser().resolve())


def protocol_of(uri: str) -> str:
    """`s3` for `s3://...`; `file` for local paths."""
    return uri.split("://", 1)[0] if "://" in uri else "file"


def join(uri: str, *names: str) -> str:
    """`uri/name/name`."""
    return "/".join([uri.rstrip("/"), *names])


def use_options(uri: str, options: dict[str, Any]) -> dict[str, str]:
    """Give fsspec `options` for the protocol of `uri`.

    Returns:
        Environment variables that give worker processes the same.
    """
    protocol = protocol_of(uri)
    if not options or protocol == "file":
        return {}
    fsspec_conf.setdefault(protocol, {}).update(options)
    return {f"FSSPEC_{protocol.upper()}": json.dumps(options)}


def filesystem(uri: str) -> tuple[Any, str]:
    """The fsspec filesystem of `uri` and the path in it.

    Raises:
        StorageError: an unknown protocol or a filesystem that cannot be set up.
    """
    try:
        return fsspec.core.url_to_fs(uri, use_listings_cache=False, skip_instance_cache=False)
    except TypeError:
        return fsspec.core.url_to_fs(uri)
    except (ValueError, ImportError) as error:
        raise StorageError(f"cannot open {uri!r}: {error}") from error


def with_retries(action: Callable[[], T], what: str) -> T:
    """Run `action`, retrying what may pass (time-outs, 5xx, resets) with backoff and jitter.

    Raises:
        StorageError: after the last try, or at once where another try cannot help (no access,
            no bucket, disk full). FileNotFoundError and FileExistsError pass through.
    """
    delay = 0.2
    for attempt in range(1, _MAX_TRIES + 1):
        try:
            return action()
        except (FileNotFoundError, FileExistsError, StillhouseError):
            raise
        except Exception as error:
            if not _may_pass(error) or attempt == _MAX_TRIES:
                raise StorageError(explain(error, what)) from error
            time.sleep(delay * (0.5 + random.random()))
            delay = min(delay * 2, 5.0)
    raise AssertionError("unreachable")


def _may_pass(error: Exception) -> bool:
    """Whether a later try of the same call can succeed, judged by type and code alone."""
    if isinstance(error, PermissionError | NotADirectoryError | IsADirectoryError | TypeError):
        return False
    if isinstance(error, OSError) and error.errno in _FINAL:
        return False
    name = type(error).__name__
    return name not in {"NoCredentialsError", "ProfileNotFound", "ParamValidationError"}


def explain(error: Exception, what: str) -> str:
    """One sentence for a storage failure: what was done, what was said, where to look."""
    said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    hint = ""
    if isinstance(error, PermissionError):
        hint = " (no access: check the credentials and the permissions of the path)"
    elif isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
        hint = " (disk full: free space and run again, finished parts are kept)"
    elif isinstance(error, OSError) and error.errno == errno.EROFS:
        hint = " (read-only: give another `store`)"
    return f"{what} failed: {said}{hint}"


def read_bytes(uri: str) -> bytes:
    """The whole object. FileNotFoundError where there is none."""
    fs, path = filesystem(uri)
    return with_retries(lambda: fs.cat_file(path), f"reading {uri}")


def open_read(uri: str) -> IO[bytes]:
    """A seekable binary file. FileNotFoundError where there is none."""
    fs, path = filesystem(uri)
    return with_retries(lambda: fs.open(path, "rb"), f"opening {uri}")


def exists(uri: str) -> bool:
    """Whether an object of this name exists now."""
    fs, path = filesystem(uri)
    return with_retries(lambda: fs.exists(path), f"looking for {uri}")


def list_names(uri: str) -> list[str]:
    """Sorted names directly under a folder; empty where there is no such folder."""
    fs, path = filesystem(uri)
    try:
        found = with_retries(lambda: fs.ls(path, detail=False), f"listing {uri}")
    except FileNotFoundError:
        return []
    prefix = path.rstrip("/")
    return sorted({p.rstrip("/").rsplit("/", 1)[-1] for p in found if p.rstrip("/") != prefix})


def list_files(paths: Iterable[str], suffixes: Iterable[str]) -> list[FileInfo]:
    """All files of the given paths (files, folders, globs, URIs), sorted by name.

    Inside a folder only files with one of `suffixes` count, and none whose name starts with a
    dot or underscore; a file or glob is taken at its word. `name` is the path relative to what
    all files of one path share, so that it does not change when the folder is renamed.

    Raises:
        InputError: a path that matches nothing.
    """
    files: dict[str, FileInfo] = {}
    wanted = tuple(suffixes)
    for given in paths:
        for info in _expand(absolute_uri(given), wanted):
            files.setdefault(info.uri, info)
    return sorted(files.values(), key=lambda info: (info.name, info.uri))


def _expand(uri: str, suffixes: tuple[str, ...]) -> list[FileInfo]:
    fs, path = filesystem(uri)
    found = with_retries(lambda: _find(fs, path, suffixes), f"listing {uri}")
    if not found:
        raise InputError(f"no files match {uri!r} (looking for {', '.join(suffixes)})")
    root = _common_folder(found)
    scheme = "" if protocol_of(uri) == "file" else protocol_of(uri) + "://"
    return [
        FileInfo(
            uri=scheme + p if scheme else p,
            name=p[len(root) :].lstrip("/"),
            size_bytes=int(d["size"]),
            stamp=_stamp(d),
        )
        for p, d in sorted(found.items())
    ]


def _find(fs: Any, path: str, suffixes: tuple[str, ...]) -> dict[str, Any]:
    if any(c in path for c in "*?["):
        found = fs.glob(path, detail=True)
        return {p: d for p, d in found.items() if d["type"] == "file"}
    found = fs.find(path, detail=True)
    if set(found) == {path}:
        return found
    return {
        p: d
        for p, d in found.items()
        if p.lower().endswith(suffixes) and not _hidden(p[len(path) :])
    }


def _hidden(relative: str) -> bool:
    return any(piece.startswith((".", "_")) for piece in relative.split("/") if piece)


def _common_folder(found: Iterable[str]) -> str:
    folders = [p.rsplit("/", 1)[0] for p in found]
    return os.path.commonpath(folders) if len(set(folders)) > 1 else folders[0]


def _stamp(detail: dict[str, Any]) -> str:
    """What changes when the file does: S3's ETag, else the modification time in ns."""
    for key in ("ETag", "etag"):
        if key in detail:
            return str(detail[key])
    for key in ("mtime", "LastModified", "last_modified", "created"):
        if key in detail:
            return str(detail[key])
    return fingerprint(str(sorted(map(str, detail.items()))))
