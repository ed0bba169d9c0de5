"""All file access: URIs to filesystems, listing, reading, with retries.

A path without a scheme is a local path; URIs made from it are absolute, so that any process on the
machine reads the same file. Everything else is opened by fsspec. Credentials come from the standard
chains and are never written down.

Options of a filesystem (endpoint, profile) live in fsspec's own configuration. A store at an
endpoint cannot tell its own endpoint; so a run keeps the `storage_options` of its spec, which hold
no secret, in `~/.config/stillhouse/stores.json` by the store's URI, for whatever opens the store
later (`verify`, `status`, a reader). Options of the process itself, by a spec or the environment,
come first.
"""

import glob
import json
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from stillhouse.errors import InputError, MissingExtraError, StorageError
from stillhouse.fingerprint import fingerprint
from stillhouse.storage.hub_files import HUB, hub_files, pinned_path
from stillhouse.storage.lance_files import SUFFIX as LANCE
from stillhouse.storage.lance_files import LanceFragment, is_fragment, list_fragments
from stillhouse.storage.remote_file import open_remote
from stillhouse.storage.retries import with_retries
from stillhouse.storage.web_file import open_web, pinned, web_info

_S3_PROTOCOLS = ("s3", "s3a")
_WITH_BUCKETS = (*_S3_PROTOCOLS, "gs", "gcs", "abfs", "abfss", "az")
_WEB_PROTOCOLS = ("http", "https")
_S3_CONFIG = {"connect_timeout": 10, "read_timeout": 20}
_ONE_TRY = {"total_max_attempts": 1, "mode": "standard"}
_THREADS = 16
_ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
_STAMPS = ("ETag", "etag", "mtime", "LastModified", "Last-Modified", "last_modified", "created")
"""Keys under which filesystems tell what changes with a file's content, the best first."""


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One listed file: `name` relative to the listing; `stamp` (an etag or modification time)
    changes when the file does.
    """

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
    return "/".join([uri.rstrip("/"), *names])


# --------------------------------------------------------------------------------------- options


def use_options(uri: str, options: dict[str, Any]) -> dict[str, str]:
    """Set fsspec's `options` for the protocol of `uri` in this process.

    Returns:
        Environment variables that set the same in worker processes.
    """
    from fsspec.config import conf

    protocol = protocol_of(uri)
    if not options or protocol == "file":
        return {}
    conf.setdefault(protocol, {}).update(options)
    return {f"FSSPEC_{protocol.upper()}": json.dumps(options)}


def remember_options(store: str, options: dict[str, Any]) -> None:
    """Keep the options of a remote store on this machine; empty ones are forgotten."""
    known = _kept_options()
    if "://" not in store or known.get(store.rstrip("/"), {}) == options:
        return
    known[store.rstrip("/")] = options
    text = json.dumps({uri: kept for uri, kept in known.items() if kept}, indent=1, sort_keys=True)
    path = _options_file()
    temporary = path.with_name(f"{path.name}.{uuid4().hex}.tmp")
    with suppress(OSError):  # no writable home: they have to be given again, by the environment
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text)
        os.replace(temporary, path)


def known_options(uri: str) -> dict[str, Any]:
    """The kept options of the store that `uri` lies in; none where the process has its own."""
    from fsspec.config import conf

    if "://" not in uri or conf.get(protocol_of(uri)) or any(n in os.environ for n in _ENDPOINTS):
        return {}
    known = _kept_options()
    stores = [store for store in known if f"{uri}/".startswith(f"{store}/")]
    return known[max(stores, key=len)] if stores else {}


def _options_file() -> Path:
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(home, "stillhouse", "stores.json")


def _kept_options() -> dict[str, dict[str, Any]]:
    try:
        return dict(json.loads(_options_file().read_bytes()))
    except (OSError, ValueError):
        return {}


def filesystem(uri: str) -> tuple[Any, str]:
    """The fsspec filesystem of `uri` and the path in it.

    On S3 the retries of botocore and s3fs are off, because ours would multiply with them; the
    user's `config_kwargs` are added.

    Raises:
        StorageError: an unknown protocol or a filesystem that cannot be set up.
        MissingExtraError: its package is not installed.
    """
    import fsspec
    from fsspec.config import conf

    protocol, known = protocol_of(uri), known_options(uri)
    try:
        if protocol in _WEB_PROTOCOLS:  # sizes and ranges are those of the file as stored
            return fsspec.filesystem(protocol, headers={"Accept-Encoding": "identity"}), uri
        if "::" in protocol:
            return fsspec.core.url_to_fs(uri, **known)
        # not `url_to_fs`, which takes a key with `::` for a chain of filesystems
        kind: Any = fsspec.get_filesystem_class(protocol)
        # without a cache of listings, which would hide what others write
        options = kind._get_kwargs_from_urls(uri) | known | {"use_listings_cache": False}
        if protocol in _S3_PROTOCOLS:
            config = _S3_CONFIG | {"retries": dict(_ONE_TRY)}
            for given in (known, *(conf.get(protocol, {}) for protocol in _S3_PROTOCOLS)):
                config |= given.get("config_kwargs", {})
            options["config_kwargs"] = config
        fs = fsspec.filesystem(protocol, **options)
        if protocol in _S3_PROTOCOLS:
            fs.retries = 1
        return fs, fs._strip_protocol(uri)
    except (ValueError, ImportError) as error:
        missing = MissingExtraError.of(error) if isinstance(error, ImportError) else None
        raise missing or StorageError(f"cannot open {uri!r}: {error}") from error


# --------------------------------------------------------------------------------------- reading


def read_bytes(uri: str) -> bytes:
    """The whole object. FileNotFoundError where there is none."""
    if protocol_of(uri) == "file":
        return with_retries(Path(uri).read_bytes, f"reading {uri}")
    fs, path = filesystem(uri)
    # s3fs asks for the size first, unless it may not cut the read in concurrent pieces
    options = {"max_concurrency": 1} if protocol_of(uri) in _S3_PROTOCOLS else {}
    return with_retries(lambda: fs.cat_file(path, **options), f"reading {uri}")


def read_many(uris: Sequence[str]) -> list[bytes]:
    """Whole small objects in the given order, several requests at a time."""
    with ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(read_bytes, uris))


def open_read(uri: str) -> IO[bytes]:
    """A seekable binary file. FileNotFoundError where there is none."""
    if is_fragment(uri):
        return LanceFragment(uri, open_read)  # pyright: ignore
    if protocol_of(uri) == "file":
        return with_retries(lambda: open(uri, "rb"), f"opening {uri}")
    fs, path = filesystem(uri)
    if protocol_of(uri) in _WEB_PROTOCOLS:
        return open_web(fs, uri)
    return open_remote(fs, path, uri)


def exists(uri: str) -> bool:
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
        paths = with_retries(lambda: fs.ls(path, detail=False), f"listing {uri}")
    except FileNotFoundError:
        return []
    prefix = path.rstrip("/")
    return sorted({p.rstrip("/").rsplit("/", 1)[-1] for p in paths if p.rstrip("/") != prefix})


# --------------------------------------------------------------------------------------- listing

_Suffixes = tuple[tuple[str, ...], ...]
"""Suffixes that are read in a folder; those that are read where it has none of them; and so on."""


def list_files(
    paths: Iterable[str], suffixes: Iterable[str], *otherwise: Iterable[str]
) -> list[FileInfo]:
    """All files of the given paths (files, folders, globs, URIs), sorted by name.

    Of a folder only files with one of `suffixes` are listed (where it has none, those with one of
    the first of `otherwise` that it has), and none under a name that starts with a dot or
    underscore; links to folders are followed. A file or glob may name any file, but a wildcard does
    not match a hidden name. `name` is relative to the folder (for a glob, to what stands before its
    first wildcard; for a file, to its folder), so that it changes neither when the folder is
    renamed nor when files are added.

    Raises:
        InputError: a path that matches nothing, a name that is not UTF-8. StorageError: a folder
            that cannot be read.
    """
    files: dict[str, FileInfo] = {}
    wanted = tuple(map(tuple, (suffixes, *otherwise)))
    listed = (hub_files(path) if path.startswith(HUB) else [path] for path in paths)
    for given in chain.from_iterable(listed):
        uri = absolute_uri(given)
        find = _find_local if protocol_of(uri) == "file" else _find_remote
        if uri.endswith(LANCE):
            find = _find_fragments
        found = with_retries(partial(find, uri, wanted), f"listing {uri}")
        if not found:
            raise InputError(_no_match(uri, wanted))
        for info in found:
            try:
                info.uri.encode()
            except UnicodeEncodeError:
                shown = info.uri.encode(errors="surrogateescape")
                message = f"the name of the file {shown!r} is not UTF-8: rename it"
                raise InputError(message) from None
            files.setdefault(info.uri, info)
    return sorted(files.values(), key=lambda info: (info.name, info.uri))


def _no_match(uri: str, wanted: _Suffixes) -> str:
    suffixes = [suffix for rank in wanted for suffix in rank]
    listed = ", ".join([s for s in suffixes if s.count(".") == 1] or suffixes)
    escaped = uri.replace("[", "[[]")
    hint = f"; write {escaped!r} if the bracket is part of the name" if "[" in uri else ""
    return (
        f"no files match {uri!r} (looking for {listed}; names that begin with . or _ are hidden"
        f" or unfinished files, which only a path of theirs names){hint}"
    )


def _find_local(path: str, suffixes: _Suffixes) -> list[FileInfo]:
    if os.path.isfile(path):
        root, paths = os.path.dirname(path), [path]
    elif os.path.isdir(path):
        root, paths = path, _in_folder(_walk(path), path, suffixes)
    else:
        root = _before_wildcard(path)
        paths = _in_glob(_glob(path, root), path, root)
    found: list[FileInfo] = []
    for file in paths:
        if os.path.isfile(file):
            stat = os.stat(file)  # follows links: what counts are the bytes behind them
            stamp = f"{stat.st_mtime_ns}-{stat.st_ctime_ns}-{stat.st_ino}"
            found.append(FileInfo(file, os.path.relpath(file, root), stat.st_size, stamp))
    return found


def _glob(pattern: str, root: str) -> Iterable[str]:
    """The paths that match a pattern; `**` walks folders as `_walk` does, so that links in a circle
    end.
    """
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


def _find_fragments(uri: str, suffixes: _Suffixes) -> list[FileInfo]:
    def size_of(file: str) -> int:
        fs, path = filesystem(file)
        return int(fs.size(path))

    return [FileInfo(*found) for found in list_fragments(uri, size_of)]


def _find_remote(uri: str, suffixes: _Suffixes) -> list[FileInfo]:
    fs, path = filesystem(uri)
    if protocol_of(uri) in _WEB_PROTOCOLS:
        detail = web_info(fs, path)
        one = pinned(uri, detail.pop("version"))
        # without an etag or date every listing counts as a change
        stamp = _stamp({"created": time.time_ns()} | detail)
        return [FileInfo(one, uri.rsplit("/", 1)[-1], detail["size"], stamp)]
    if protocol_of(uri) == "hf":
        path = pinned_path(fs, path)
    wild = any(c in path for c in "*?[") and not fs.isfile(path)
    try:
        found = fs.glob(path, detail=True) if wild else fs.find(path, detail=True)
    except FileNotFoundError:
        found = {}
    if isinstance(found, list):  # adlfs, of a single object
        found = {p: fs.info(p) for p in found}
    bucket = path.split("/")[0]
    if not found and protocol_of(uri) in _WITH_BUCKETS and not fs.exists(bucket):
        raise InputError(f"{uri}: there is no bucket {bucket!r}, or it may not be listed")
    files = {p: detail for p, detail in found.items() if detail["type"] == "file"}
    if wild:
        root = _before_wildcard(path)
        listed = _in_glob(files, path, root)
    elif set(files) == {path}:
        root, listed = path.rsplit("/", 1)[0], [path]
    else:
        root = path.rstrip("/")
        listed = _in_folder(files, root, suffixes)
    details = [(path, files[path]) for path in listed]
    return [
        FileInfo(fs.unstrip_protocol(p), p[len(root) + 1 :], int(d["size"]), _stamp(d))
        for p, d in details
    ]


def _in_glob(paths: Iterable[str], pattern: str, root: str) -> list[str]:
    """Without hidden and unfinished files, unless the pattern spells such a name itself."""
    spelled = _hidden(pattern[len(root) :])
    return [path for path in paths if spelled or not _hidden(path[len(root) :])]


def _in_folder(paths: Iterable[str], root: str, suffixes: _Suffixes) -> list[str]:
    seen = [path for path in paths if not _hidden(path[len(root) :])]
    ranks = ([p for p in seen if p.lower().endswith(wanted)] for wanted in suffixes)
    return next(filter(None, ranks), [])


def _hidden(path: str) -> bool:
    return any(piece.startswith((".", "_")) for piece in path.strip("/").split("/"))


def _before_wildcard(path: str) -> str:
    first = min((path.index(c) for c in "*?[" if c in path), default=len(path))
    return path[:first].rsplit("/", 1)[0]


def _stamp(detail: dict[str, Any]) -> str:
    key = next((key for key in _STAMPS if key in detail), None)
    return str(detail[key]) if key else fingerprint(str(sorted(map(str, detail.items()))))
