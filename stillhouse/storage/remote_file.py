"""A remote object as a seekable file whose every range read is retried."""

import errno
import io
import time
from typing import Any

from stillhouse.errors import InputError
from stillhouse.storage.retries import with_retries

_BLOCK_BYTES = 4 << 20
_BUFFER_BYTES = 1 << 16
_MAX_WHOLE_BYTES = 1 << 30


class _Ranges(io.RawIOBase):
    """Reads one object in ranges of at least a block, and keeps the last range.

    Python's own buffer is not enough: text files and `read1` bypass it with requests of 8 KiB.
    """

    def __init__(self, fs: Any, path: str, uri: str) -> None:
        self._fs, self._path, self._uri = fs, path, uri
        self._size = int(with_retries(lambda: fs.info(path), f"opening {uri}")["size"])
        self._position = 0
        self._block, self._block_start = memoryview(b""), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        if self._position >= self._size:
            return 0
        offset = self._position - self._block_start
        if not 0 <= offset < len(self._block):
            # a little more, because BufferedReader asks for whole pages first, then for the rest
            self._fetch(max(len(buffer) + _BUFFER_BYTES, _BLOCK_BYTES))
            offset = 0
        data = self._block[offset : offset + len(buffer)]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def readall(self) -> bytes:
        rest = bytearray(max(self._size - self._position, 0))
        done = 0
        while done < len(rest):
            done += self.readinto(memoryview(rest)[done:])
        return bytes(rest)

    def _fetch(self, num_bytes: int) -> None:
        start, end = self._position, min(self._position + num_bytes, self._size)

        def read() -> tuple[int, bytes]:
            data: bytes = self._fs.cat_file(self._path, start=start, end=end)
            if len(data) == end - start:
                return start, data
            if len(data) == self._size <= _MAX_WHOLE_BYTES:  # a web server without ranges
                return 0, data
            raise OSError(errno.EIO, f"got {len(data)} of {end - start} bytes")

        self._block_start, data = with_retries(read, f"reading {self._uri}")
        self._block = memoryview(data)


def open_remote(fs: Any, path: str, uri: str) -> io.BufferedReader:
    """Open an object for reading: a request for its size, then one for each 4 MiB or more.

    Raises:
        FileNotFoundError: there is no such object. StorageError: it cannot be read.
    """
    return io.BufferedReader(_Ranges(fs, path, uri), _BUFFER_BYTES)


def web_info(fs: Any, uri: str) -> dict[str, Any]:
    """A web server's headers of a file: its `size`, and an etag or date where it has one.

    Raises:
        InputError: there is no such file, or the server refuses it or does not tell its length.
    """
    try:
        detail = fs.info(uri)
    except FileNotFoundError as error:
        status = getattr(error.__cause__, "status", None)
        if error.__cause__ is None or status is None or status >= 500:
            raise error.__cause__ or error from error
        raise InputError(f"{uri}: not found: the server answers {status}") from error
    if detail["size"] is None:
        raise InputError(f"{uri}: the server does not say its length: download the file")
    # without an etag or date every listing counts as a change
    return detail | {"created": time.time_ns()}
