"""Units of tokenising: which files, or ranges of rows, are packed together.

Groups must hardly change when a file is added, so that finished parts are found again. Files are
taken in sorted order, and a group of small files closes where a file's own digest says so
(content-defined chunking on whole files), between a quarter of `GROUP_BYTES` and all of it:
after the files differ, two listings share all later groups from the first border they share on.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class InputFile:
    """One input file.

    Attributes:
        uri: where it is.
        name: its path relative to the listing.
        size_bytes: its size as stored.
        digest: hex SHA-256 of its content.
        row_group_rows: rows of each row group, of Parquet files larger than a unit; else None.
        label: the source of all its rows, where a folder's name says so.
    """

    uri: str
    name: str
    size_bytes: int
    digest: str
    row_group_rows: tuple[int, ...] | None = None
    label: str | None = None

    def identity(self) -> list[str | int | None]:
        """What its rows depend on: its content, and a label where there is one."""
        return [self.digest, *([self.label] if self.label is not None else [])]


@dataclass(frozen=True, slots=True)
class FileRange:
    """A whole file (`rows` None) or a half-open range of its rows; `file` is its index."""

    file: int
    rows: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Unit:
    """Files or ranges that are packed together, in order."""

    ranges: tuple[FileRange, ...]

    def identity(self, files: Sequence[InputFile]) -> list[list[str | int | None]]:
        """For fingerprints: what each file is, first row and end row of each range in order."""
        return [[*files[r.file].identity(), *(r.rows or (None, None))] for r in self.ranges]


GROUP_BYTES = 2**17
"""Only small files share a unit: a larger group would be packed again for each file added."""


def group_units(files: Sequence[InputFile], *, unit_bytes: int) -> list[Unit]:
    """Cut a sorted listing into units of at most about `unit_bytes`, every file exactly once.

    A file larger than a group is alone; larger than a unit, Parquet is cut in ranges of whole row
    groups, other formats stay in one piece.
    """
    limit = min(GROUP_BYTES, unit_bytes)
    units: list[Unit] = []
    group: list[FileRange] = []
    group_bytes = 0
    for index, file in enumerate(files):
        if group and group_bytes + file.size_bytes > limit:
            units.append(Unit(tuple(group)))
            group, group_bytes = [], 0
        if file.size_bytes > limit:
            units.extend(Unit((part,)) for part in _large_file(index, file, unit_bytes))
            continue
        group.append(FileRange(index))
        group_bytes += file.size_bytes
        if group_bytes * 4 >= limit and _closes(file, limit):
            units.append(Unit(tuple(group)))
            group, group_bytes = [], 0
    return [*units, Unit(tuple(group))] if group else units


def _closes(file: InputFile, limit: int) -> bool:
    """Once per `limit / 4` bytes on average: a file's chance is proportional to its size.

    It depends on nothing but this file, so that another one cannot change it.
    """
    return int(file.digest[:8], 16) * limit < 4 * max(file.size_bytes, 1) * 2**32


def _large_file(index: int, file: InputFile, unit_bytes: int) -> Iterator[FileRange]:
    """Ranges of row groups, closed as soon as their share of the bytes reaches a unit."""
    if file.row_group_rows is None:
        yield FileRange(index)
        return
    num_rows = sum(file.row_group_rows)
    start = stop = 0
    for rows in file.row_group_rows:
        stop += rows
        if stop == num_rows or (stop - start) * file.size_bytes >= unit_bytes * num_rows:
            yield FileRange(index, (start, stop))
            start = stop
        if stop == num_rows:
            return
