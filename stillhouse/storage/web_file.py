"""Files on web servers: read in ranges where the server sends them, else downloaded once.

A file is known by its ETag, or else the date of its last change, or else its length. That is kept
in the fragment of its URL, which servers never see; whoever reads a URL with one is told if the
server has another file by then.
"""

import io
import tempfile
from dataclasses import dataclass
from functools import partial
from typing import IO, Any
from urllib.parse import quote, unquote, urldefrag

from stillhouse.errors import InputError
from stillhouse.storage.remote_file import BUFFER_BYTES, Ranges
from stillhouse.storage.retries import with_retries

_CHUNK = 1 << 20
_SILENCE_S = 60.0
_PIN = "is:"


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a server sent: a range, or the whole file.

    Attributes:
        headers: of the response.
        size: of the whole file.
        version: what it is known by.
        data: the range.
        file: the whole file instead.
    """

    headers: dict[str, str]
    size: int
    version: str
    data: bytes = b""
    file: IO[bytes] | None = None


def pinned(uri: str, version: str) -> str:
    """The URL of one version of a file."""
    return f"{urldefrag(uri).url}#{_PIN}{quote(version, safe='')}"


def web_info(fs: Any, uri: str) -> dict[str, Any]:
    """A web server's headers of a file: its `size` and `version`, and an etag or date where it has
    one. A file of which the server does not tell the length is downloaded to find out.

    Raises:
        InputError: there is no such file, or the server refuses it.
    """
    try:
        answer = _ask(fs, urldefrag(uri).url, 0, 1, keep=False)
    except FileNotFoundError as error:
        raise InputError(f"{uri}: not found: {error}") from error
    stamps = {name: answer.headers[name] for name in _VERSIONS if name in answer.headers}
    return {"size": answer.size, "version": answer.version} | stamps


def open_web(fs: Any, uri: str) -> IO[bytes]:
    """Open a file for reading, from any position: with a server that sends ranges a request for
    each 4 MiB or more behind the first one; else it lies in a temporary file until it is closed.

    Raises:
        InputError: the server has another file by now, or refuses it. FileNotFoundError: it has
            none. StorageError: it cannot be read.
    """
    uri, _, pin = uri.partition("#")
    version = unquote(pin.removeprefix(_PIN)) if pin.startswith(_PIN) else ""
    first = _checked(
        with_retries(partial(_ask, fs, uri, 0, BUFFER_BYTES), f"opening {uri}"), uri, version
    )
    if first.file is not None:
        return first.file

    def fetch(start: int, end: int) -> bytes:
        known = first.data[start:end]
        if len(known) == end - start:
            return known
        answer = _checked(_ask(fs, uri, start + len(known), end), uri, first.version)
        if answer.file is not None:
            raise InputError(f"{uri}: the server no longer sends ranges of it: run again")
        return known + answer.data

    return io.BufferedReader(Ranges(uri, first.size, fetch), BUFFER_BYTES)


def _checked(answer: _Answer, uri: str, version: str) -> _Answer:
    if version and answer.version != version:
        raise InputError(
            f"{uri} changed on the server while the job ran ({version} became {answer.version}): "
            "run again"
        )
    return answer


_VERSIONS = ("ETag", "Last-Modified")


def _ask(fs: Any, uri: str, start: int, end: int, *, keep: bool = True) -> _Answer:
    from fsspec.asyn import sync

    answer: Any = sync(fs.loop, _get, fs, uri, start, end, keep)
    return answer


async def _get(fs: Any, uri: str, start: int, end: int, keep: bool) -> _Answer:
    from aiohttp import ClientTimeout

    session = await fs.set_session()
    given = dict(fs.kwargs)
    given["headers"] = given.get("headers", {}) | {"Range": f"bytes={start}-{end - 1}"}
    given.setdefault("timeout", ClientTimeout(total=None, sock_read=_SILENCE_S))
    response = await session.get(fs.encode_url(uri), **given)
    if response.status == 206 and not _total(response).isdigit():
        response.release()  # how long the file is nobody says: all of it, to its end
        del given["headers"]["Range"]
        response = await session.get(fs.encode_url(uri), **given)
    try:
        return await _read(response, uri, keep)
    finally:
        response.release()


def _total(response: Any) -> str:
    """The length of the whole file as a partial answer has it; `*` where it is unknown."""
    return response.headers.get("Content-Range", "").rpartition("/")[2]


async def _read(response: Any, uri: str, keep: bool) -> _Answer:
    headers, status = dict(response.headers), response.status
    total = _total(response)
    if status == 206 and total.isdigit():
        return _answer(headers, int(total), data=await response.read())
    if status == 416 and total == "0":
        return _answer(headers, 0, file=io.BytesIO())
    if status in (404, 410):
        raise FileNotFoundError(f"the server answers {status}")
    if 400 <= status < 500 and status not in (408, 425, 429):
        raise InputError(f"{uri}: the server answers {status}: it may not be read")
    response.raise_for_status()
    length = response.headers.get("Content-Length")
    if not keep and length is not None and "Content-Encoding" not in response.headers:
        return _answer(headers, int(length))
    file = tempfile.TemporaryFile()  # noqa: SIM115
    async for chunk in response.content.iter_chunked(_CHUNK):
        file.write(chunk)
    size = file.tell()
    file.seek(0)
    return _answer(headers, size, file=file)


def _answer(headers: dict[str, str], size: int, **content: Any) -> _Answer:
    lower = {name.lower(): value for name, value in headers.items()}
    found = {name: lower[name.lower()] for name in _VERSIONS if name.lower() in lower}
    version = next(iter(found.values()), f"{size} bytes")
    return _Answer(found, size, version, **content)
