"""A remote object as a seekable file whose every range read is retried."""

import errno
import io
from collections.abc import Callable
from typing import Any

from stillhouse.storage.retries import with_retries

BLOCK_BYTES = 4 << 20
BUFFER_BYTES = 1 << 16


class Ranges(io.RawIOBase):
    """Reads one object in ranges of at least a block, and keeps the last range.

    Python's own buffer is not enough: text files and `read1` bypass it with requests of 8 KiB.

    Args:
        uri: for messages.
        size: of the object, in bytes.
        fetch: the bytes from `start` to `end`.
    """

    def __init__(self, uri: str, size: int, fetch: Callable[[int, int], bytes]) -> None:
        self._uri, self._size, self._get = uri, size, fetch
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

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        if self._position >= self._size:
            return 0
        offset = self._position - self._block_start
        if not 0 <= offset < len(self._block):
            # a little more, because BufferedReader asks for whole pages first, then for the rest
            self._fetch(max(len(buffer) + BUFFER_BYTES, BLOCK_BYTES))
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
        self._block, self._block_start = memoryview(self._range(start, end)), start

    def _range(self, start: int, end: int) -> bytes:
        """All bytes from `start` to `end`, with retries."""

        def read() -> bytes:
            data = self._get(start, end)
            if len(data) != end - start:
                raise OSError(errno.EIO, f"got {len(data)} of {end - start} bytes")
            return data

        return with_retries(read, f"reading {self._uri}")


def open_remote(fs: Any, path: str, uri: str) -> io.BufferedReader:
    """Open an object for reading: a request for its size, then one for each 4 MiB or more.

    Raises:
        FileNotFoundError: there is no such object. StorageError: it cannot be read.
    """
    size = int(with_retries(lambda: fs.info(path), f"opening {uri}")["size"])
    ranges = Ranges(uri, size, lambda start, end: fs.cat_file(path, start=start, end=end))
    return io.BufferedReader(ranges, BUFFER_BYTES)
