"""Ranges of an object: for readers that know which of its bytes they need."""

from functools import partial
from typing import Any

from stillhouse.storage.filesystem import filesystem, protocol_of
from stillhouse.storage.remote_file import Ranges


class FetchedRanges(Ranges):
    """An object of `num_bytes` as a file that keeps all ranges which were fetched or read."""

    def __init__(self, uri: str, num_bytes: int) -> None:
        super().__init__(uri, num_bytes, partial(_bytes_of, uri))
        self._fetched: list[tuple[int, bytes]] = []

    def fetch(self, start: int, end: int) -> None:
        """Get the bytes from `start` to `end`, by one request where they are not there yet."""
        if self._known(start, end) is None:
            self._fetched.append((start, self._range(start, end)))

    def readinto(self, buffer: Any) -> int:
        start, end = self._position, min(self._position + len(buffer), self._size)
        if self._known(start, end) is None:
            self.fetch(start, end)
        data = self._known(start, end) or b""
        buffer[: len(data)] = data
        self._position = end
        return len(data)

    def _known(self, start: int, end: int) -> bytes | None:
        for first, data in self._fetched:
            if first <= start and end <= first + len(data):
                return data[start - first : end - first]
        return None


def _bytes_of(uri: str, start: int, end: int) -> bytes:
    if protocol_of(uri) == "file":
        with open(uri, "rb") as file:
            file.seek(start)
            return file.read(end - start)
    fs, path = filesystem(uri)
    return fs.cat_file(path, start=start, end=end)
