"""Every byte goes through here: URIs to filesystems, listing, reading, all with retries.

A path without a scheme is a local path; URIs made from it are absolute, so that any process on
the machine reads the same file. Anything else is fsspec's. Options of a filesystem (endpoint,
profile) live in fsspec's own configuration and in `store_options`, credentials in the standard
chains: these are never written down.
"""

import glob
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import IO, Any

from stillhouse.errors import InputError, MissingExtraError, StorageError
from stillhouse.fingerprint import fingerprint
from stillhouse.storage.retries import with_retries
from stillhouse.storage.store_options import known_options

S3_PROTOCOLS = ("s3", "s3a")
_WEB_PROTOCOLS = ("http", "https")
_S3_CONFIG = {"connect_timeout": 10, "read_timeout": 20}
_ONE_TRY = {"total_max_attempts": 1, "mode": "standard"}
_THREADS = 16


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
    return uri.rstrip("/") if "://" in uri else os.path.abspath(os.path.expanduser(uri))


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
    from fsspec.config import conf

    protocol = protocol_of(uri)
    if not options or protocol == "file":
        return {}
    conf.setdefault(protocol, {}).update(options)
    return {f"FSSPEC_{protocol.upper()}": json.dumps(options)}


def filesystem(uri: str) -> tuple[Any, str]:
    """The fsspec filesystem of `uri` and the path in it.

    On S3 the retries of botocore and s3fs are off, for ours would multiply with them; the user's
    `config_kwargs` come on top.

    Raises:
        StorageError: an unknown protocol or a filesystem that cannot be set up.
        MissingExtraError: its package is not installed.
    """
    import fsspec
    from fsspec.config import conf

    protocol = protocol_of(uri)
    try:
        if protocol in _WEB_PROTOCOLS:  # sizes and ranges are those of the file as it lies there
            return fsspec.filesystem(protocol, headers={"Accept-Encoding": "identity"}), uri
        if protocol not in S3_PROTOCOLS:
            return fsspec.core.url_to_fs(uri, **known_options(uri))
        # not `url_to_fs`, which takes a key with `::` for a chain of filesystems
        known = known_options(uri)
        fs = fsspec.filesystem(
            protocol,
            **known | {"use_listings_cache": False, "config_kwargs": _s3_config(conf, known)},
        )
        path = fs._strip_protocol(uri)
        fs.retries = 1
        return fs, path
    except (ValueError, ImportError) as error:
        named = MissingExtraError.of(error) if isinstance(error, ImportError) else None
        raise named or StorageError(f"cannot open {uri!r}: {error}") from error


def _s3_config(conf: dict[str, dict[str, Any]], known: dict[str, Any]) -> dict[str, Any]:
    config = _S3_CONFIG | {"retries": dict(_ONE_TRY)}
    for options in (known, *(conf.get(protocol, {}) for protocol in S3_PROTOCOLS)):
        config |= options.get("config_kwargs", {})
    return config


def read_bytes(uri: str) -> bytes:
    """The whole object. FileNotFoundError where there is none."""
    protocol = protocol_of(uri)
    if protocol == "file":
        return with_retries(Path(uri).read_bytes, f"reading {uri}")
    fs, path = filesystem(uri)
    # s3fs asks for the size first, unless it may not cut the read in concurrent pieces
    options = {"max_concurrency": 1} if protocol in S3_PROTOCOLS else {}
    return with_retries(lambda: fs.cat_file(path, **options), f"reading {uri}")


def read_many(uris: Sequence[str]) -> list[bytes]:
    """Whole small objects in the given order, several requests at a time."""
    with ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(read_bytes, uris))


def open_read(uri: str) -> IO[bytes]:
    """A seekable binary file. FileNotFoundError where there is none."""
    if protocol_of(uri) == "file":
        return with_retries(lambda: open(uri, "rb"), f"opening {uri}")
    from stillhouse.storage.remote_file import open_remote

    return open_remote(*filesystem(uri), uri)


def exists(uri: str) -> bool:
    """Whether an object of this name exists now."""
    if protocol_of(uri) == "file":
        return os.path.exists(uri)
    fs, path = filesystem(uri)
    return with_retries(lambda: fs.exists(path), f"looking for {uri}")


def list_names(uri: str) -> list[str]:
    """Sorted names directly under a folder; empty where there is no such folder."""
    try:
        if protocol_of(uri) == "file":
            return sorted(with_retries(lambda: os.listdir(uri), f"listing {uri}"))
        fs, path = filesystem(uri)
        found = with_retries(lambda: fs.ls(path, detail=False), f"listing {uri}")
    except FileNotFoundError:
        return []
    prefix = path.rstrip("/")
    return sorted({p.rstrip("/").rsplit("/", 1)[-1] for p in found if p.rstrip("/") != prefix})


def list_files(
    paths: Iterable[str], suffixes: Iterable[str], otherwise: Iterable[str] = ()
) -> list[FileInfo]:
    """All files of the given paths (files, folders, globs, URIs), sorted by name.

    Inside a folder only files with one of `suffixes` count (where it has none, those with one of
    `otherwise`), and none under a name that starts with a dot or underscore; links to folders are
    followed. A file or glob is taken at its word, but a wildcard does not stand for such a name.
    `name` is relative to the folder (for a glob,
    to what stands before its first wildcard; for a file, to its folder), so that it changes
    neither when the folder is renamed nor when files are added.

    Raises:
        InputError: a path that matches nothing, a name that is not UTF-8. StorageError: a folder
            that cannot be read.
    """
    files: dict[str, FileInfo] = {}
    wanted = tuple(suffixes), tuple(otherwise)
    for given in paths:
        uri = absolute_uri(given)
        find = _find_local if protocol_of(uri) == "file" else _find_remote
        found = with_retries(partial(find, uri, wanted), f"listing {uri}")
        if not found:
            raise InputError(_no_match(uri, wanted))
        for info in found:
            _check_name(info.uri)
            files.setdefault(info.uri, info)
    return sorted(files.values(), key=lambda info: (info.name, info.uri))


_Suffixes = tuple[tuple[str, ...], tuple[str, ...]]
"""Those that count in a folder, and those that do where it has none of them."""


def _no_match(uri: str, wanted: _Suffixes) -> str:
    sought = ", ".join(s for s in [*wanted[0], *wanted[1]] if s.count(".") == 1)
    escaped = uri.replace("[", "[[]")
    hint = f"; write {escaped!r} if the bracket is part of the name" if "[" in uri else ""
    return (
        f"no files match {uri!r} (looking for {sought}; names that begin with . or _ are hidden"
        f" or unfinished files, which only a path of theirs names){hint}"
    )


def _check_name(uri: str) -> None:
    try:
        uri.encode()
    except UnicodeEncodeError:
        shown = uri.encode(errors="surrogateescape")
        raise InputError(f"the name of the file {shown!r} is not UTF-8: rename it") from None


def _find_local(path: str, suffixes: _Suffixes) -> list[FileInfo]:
    if os.path.isfile(path):
        root, found = os.path.dirname(path), [path]
    elif os.path.isdir(path):
        root, found = path, _counted(_walk(path), path, suffixes)
    else:
        root = _before_wildcard(path)
        found = _named(_glob(path, root), path, root)
    return [_local_info(p, root) for p in found if os.path.isfile(p)]


def _glob(pattern: str, root: str) -> Iterable[str]:
    """What matches a pattern; `**` is walked as a folder is, so that links in a circle end."""
    pieces = pattern[len(root) + 1 :].split("/")
    if "**" not in pieces:
        return glob.glob(pattern)
    found = _walk(root) if os.path.isdir(root) else []
    return (path for path in found if _matches(path[len(root) + 1 :].split("/"), pieces))


def _matches(names: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern or (not names and pattern[0] != "**"):
        return not pattern and not names
    if pattern[0] == "**":
        return any(_matches(names[i:], pattern[1:]) for i in range(len(names) + 1))
    return fnmatchcase(names[0], pattern[0]) and _matches(names[1:], pattern[1:])


def _walk(folder: str) -> Iterable[str]:
    def refuse(error: OSError) -> None:
        raise error

    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        place = os.path.realpath(parent)
        if place in seen:  # a link leads back to where it is, or two lead to one place
            folders.clear()
            continue
        seen.add(place)
        folders.sort()
        yield from (os.path.join(parent, name) for name in names)


def _local_info(path: str, root: str) -> FileInfo:
    """Symbolic links are followed: what counts is when the bytes behind them changed."""
    found = os.stat(path)
    stamp = f"{found.st_mtime_ns}-{found.st_ctime_ns}-{found.st_ino}"
    return FileInfo(path, os.path.relpath(path, root), found.st_size, stamp)


def _find_remote(uri: str, suffixes: _Suffixes) -> list[FileInfo]:
    if protocol_of(uri) in _WEB_PROTOCOLS:
        from stillhouse.storage.remote_file import web_info

        fs, path = filesystem(uri)
        detail = web_info(fs, path)
        return [FileInfo(uri, uri.rsplit("/", 1)[-1], detail["size"], _stamp(detail))]
    fs, path = filesystem(uri)
    wild = any(c in path for c in "*?[") and not fs.isfile(path)
    try:
        found = fs.glob(path, detail=True) if wild else fs.find(path, detail=True)
    except FileNotFoundError:
        found = {}
    bucket = path.split("/")[0]
    if not found and protocol_of(uri) in S3_PROTOCOLS and not fs.exists(bucket):
        raise InputError(f"{uri}: there is no bucket {bucket!r}, or it may not be listed")
    files = {p: detail for p, detail in found.items() if detail["type"] == "file"}
    if wild:
        root = _before_wildcard(path)
        files = {p: files[p] for p in _named(files, path, root)}
    elif set(files) == {path}:
        root = path.rsplit("/", 1)[0]
    else:
        root = path.rstrip("/")
        files = {p: files[p] for p in _counted(files, root, suffixes)}
    return [
        FileInfo(fs.unstrip_protocol(p), p[len(root) + 1 :], int(detail["size"]), _stamp(detail))
        for p, detail in files.items()
    ]


def _named(paths: Iterable[str], pattern: str, root: str) -> list[str]:
    """What a glob names: no hidden or unfinished files, unless it spells such a name itself."""
    if _hidden(pattern[len(root) :]):
        return list(paths)
    return [path for path in paths if not _hidden(path[len(root) :])]


def _counted(paths: Iterable[str], root: str, suffixes: _Suffixes) -> list[str]:
    """The files of a folder that are read."""
    seen = [path for path in paths if not _hidden(path[len(root) :])]
    first, second = ([p for p in seen if p.lower().endswith(wanted)] for wanted in suffixes)
    return first or second


def _hidden(path: str) -> bool:
    return any(piece.startswith((".", "_")) for piece in path.strip("/").split("/"))


def _before_wildcard(path: str) -> str:
    first = min(path.index(c) for c in "*?[" if c in path) if set(path) & set("*?[") else len(path)
    return path[:first].rsplit("/", 1)[0]


def _stamp(detail: dict[str, Any]) -> str:
    """What changes when the file does: S3's ETag, else a modification time, else anything."""
    for key in (
        "ETag",
        "etag",
        "mtime",
        "LastModified",
        "Last-Modified",
        "last_modified",
        "created",
    ):
        if key in detail:
            return str(detail[key])
    return fingerprint(str(sorted(map(str, detail.items()))))
