"""Ranges of an object: for readers that know which of its bytes they need."""

import errno
import io
from typing import Any

from stillhouse.storage.filesystem import filesystem, protocol_of
from stillhouse.storage.retries import with_retries


def read_range(uri: str, start: int, end: int) -> bytes:
    """The bytes of an object from `start` to `end`, by one request.

    Raises:
        FileNotFoundError: there is none. StorageError: it is shorter.
    """

    def read() -> bytes:
        if protocol_of(uri) == "file":
            with open(uri, "rb") as file:
                file.seek(start)
                data = file.read(end - start)
        else:
            fs, path = filesystem(uri)
            data = fs.cat_file(path, start=start, end=end)
        if len(data) != end - start:
            raise OSError(errno.EIO, f"got {len(data)} of {end - start} bytes")
        return data

    return with_retries(read, f"reading {uri}")


class FetchedRanges(io.RawIOBase):
    """An object of `num_bytes` as a file of which only the fetched ranges can be read."""

    def __init__(self, uri: str, num_bytes: int) -> None:
        self._uri, self._size, self._position = uri, num_bytes, 0
        self._ranges: list[tuple[int, bytes]] = []

    def fetch(self, start: int, end: int) -> None:
        """Get the bytes from `start` to `end`, by one request where they are not there yet."""
        if self._find(start, end) is None:
            self._ranges.append((start, read_range(self._uri, start, end)))

    def _find(self, start: int, end: int) -> bytes | None:
        for first, data in self._ranges:
            if first <= start and end <= first + len(data):
                return data[start - first : end - first]
        return None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        end = min(self._position + len(buffer), self._size)
        data = self._find(self._position, end)
        if data is None:
            raise OSError(
                errno.EINVAL, f"bytes {self._position} to {end} of {self._uri} were not fetched"
            )
        buffer[: len(data)] = data
        self._position = end
        return len(data)
