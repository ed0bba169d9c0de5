"""Lance data sets, a fragment as a file: `PATH.lance#VERSION/FRAGMENT`.

The version is the latest one at the time of listing. A fragment's content is that of its files,
which are never changed: new rows are new fragments, and deleted rows are listed in another file.
"""

import io
from collections.abc import Callable
from typing import IO, Any

from stillhouse.errors import InputError, require
from stillhouse.fingerprint import fingerprint

SUFFIX = ".lance"


def is_fragment(uri: str) -> bool:
    return f"{SUFFIX}#" in uri


def list_fragments(uri: str, size_of: Callable[[str], int]) -> list[tuple[str, str, int, str]]:
    """URI, name, size in bytes and stamp of each fragment of a data set.

    Args:
        uri: its folder.
        size_of: the size of a file.

    Raises:
        InputError: there is no data set. MissingExtraError: Lance is not installed.
    """
    require("lance")
    import lance

    try:
        found: Any = lance.dataset(uri)
    except (ValueError, OSError) as error:
        raise InputError(f"{uri}: no Lance data set: {str(error).splitlines()[0]}") from error
    listed: list[tuple[str, str, int, str]] = []
    for fragment in found.get_fragments():
        files = _files(uri, fragment)
        place = f"{uri}#{found.version}/{fragment.fragment_id}"
        name = f"{uri.rsplit('/', 1)[-1]}/{fragment.fragment_id:08d}"
        listed.append((place, name, sum(map(size_of, files)), fingerprint(files)))
    return listed


def _files(folder: str, fragment: Any) -> list[str]:
    """The files of a fragment, first those of its columns, then that of its deleted rows."""
    found = [f"{folder}/data/{file.path}" for file in fragment.data_files()]
    deleted = fragment.deletion_file()
    return [*found, *([f"{folder}/{deleted}"] if deleted else [])]


class LanceFragment(io.RawIOBase):
    """A fragment as a file: what is read are its files one after the other, for a digest; `rows`
    is what Lance reads.
    """

    def __init__(self, uri: str, open_file: Callable[[str], IO[bytes]]) -> None:
        import lance

        folder, _, place = uri.rpartition("#")
        version, number = map(int, place.split("/"))
        try:
            self.rows: Any = lance.dataset(folder, version=version).get_fragment(number)
        except (ValueError, OSError) as error:
            reason = str(error).splitlines()[0]
            message = f"{folder}: its version {version} is no longer there, run again: {reason}"
            raise InputError(message) from error
        self._left, self._open, self._file = _files(folder, self.rows), open_file, io.BytesIO()

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        data = self._file.read(size)
        while not data and self._left:
            self._file.close()
            self._file: IO[bytes] = self._open(self._left.pop(0))
            data = self._file.read(size)
        return data
