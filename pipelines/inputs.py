"""Inputs of a job: the files of its data sources, their content digests, and the units of work."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from stillhouse.custom_code import CustomCode
from stillhouse.data_settings import DataSource, PartTokens, PoolSource
from stillhouse.errors import InputError
from stillhouse.fingerprint import fingerprint
from stillhouse.selection.takedown import TakedownLists, read_lists
from stillhouse.spec import SelectSpec
from stillhouse.storage import numbered
from stillhouse.storage.artifact import Store
from stillhouse.storage.digests import digest_files
from stillhouse.storage.filesystem import FileInfo
from stillhouse.text.formats import lower_name
from stillhouse.text.records import folder_keys, list_documents, used_keys
from stillhouse.text.tasks import InputFile, ScanTask, Unit, UnitFile, group_units

_BYTES_PER_TOKEN = 4
_PARTS = 64
_PACKED_SIZE = {".parquet": 2.5, ".gz": 3.5, ".zst": 3.5, ".bz2": 4.0, ".xz": 4.0}
"""Bytes of text for each stored byte, roughly."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """The files of one data source, sorted, and the units of work that they are cut into."""

    source: DataSource
    files: tuple[InputFile, ...]
    units: tuple[Unit, ...]
    part_tokens: int

    @property
    def num_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    def identity(self) -> str:
        """Fingerprint of the content and of how it is read."""
        return fingerprint([self.source.identity(), [f.identity() for f in self.files]])


def list_source(source: DataSource) -> list[FileInfo]:
    """The files of a data source, sorted.

    CSV and TSV in a folder with files of rows, and plain text in a folder with either (a README.md,
    a licence), are not data. They are read where a folder holds nothing else, and where a path or
    glob names them.

    Raises:
        InputError: nothing matches, or all files are empty.
    """
    found = list_documents(source.paths, source.reader)
    if not any(info.size_bytes for info in found):
        raise InputError(f"all files of {source.path!r} are empty")
    return found


def open_inputs(
    store: Store,
    source: DataSource,
    found: list[FileInfo],
    part_tokens: PartTokens,
    *,
    remember: bool = True,
) -> Inputs:
    """Digest the listed files of a data source (cached where they are unchanged).

    With `remember`, the value of `part_tokens: auto` is pinned.
    """
    if part_tokens == "auto":
        part_tokens = _pinned_part_tokens(store, source, found, remember=remember)
    digests = digest_files(store, found, remember=remember)
    unit_bytes = part_tokens * _BYTES_PER_TOKEN
    kept = source.keep_columns if isinstance(source, PoolSource) else ()
    has_ranges = not isinstance(source.reader, CustomCode)  # whose rows need not be a file's rows
    files = tuple(
        InputFile(
            info.uri,
            info.name,
            info.size_bytes,
            digest.sha256,
            digest.piece_rows if has_ranges and info.size_bytes > unit_bytes else None,
            folder_keys(info.uri).get(source.columns.source or "source"),
            tuple(used_keys(info.uri, kept)),
        )
        for info, digest in zip(found, digests, strict=True)
    )
    units = tuple(group_units(files, unit_bytes=unit_bytes))
    return Inputs(source, files, units, part_tokens)


def _pinned_part_tokens(
    store: Store, source: DataSource, found: list[FileInfo], *, remember: bool
) -> int:
    """The value of `part_tokens: auto`, decided by the first listing of the paths in this store.

    So finished parts stay valid, whatever is added.
    """
    folder = store.path("pins", fingerprint(["part tokens", source.paths]))
    numbers = numbered.versions(folder)
    if not numbers:
        size = auto_part_tokens(guess_bytes(found))
        if not remember:
            return size
        numbered.append(folder, {"part_tokens": size})
        numbers = numbered.versions(folder)
    return numbered.read_version(folder, numbers[0])["part_tokens"]


def auto_part_tokens(num_bytes: float) -> int:
    """A power of two from 2**17 to 2**24 tokens that makes about 64 parts of the text."""
    wanted = num_bytes / _BYTES_PER_TOKEN / _PARTS
    return 2 ** min(max(round(math.log2(max(wanted, 1))), 17), 24)


def guess_bytes(files: Iterable[FileInfo | InputFile]) -> float:
    """Uncompressed bytes of text, roughly."""
    total = 0.0
    for file in files:
        factor = [f for end, f in _PACKED_SIZE.items() if lower_name(file.uri).endswith(end)]
        total += file.size_bytes * (factor[0] if factor else 1)
    return total


def scan_tasks(inputs: Inputs) -> list[ScanTask]:
    return [
        ScanTask(
            tuple(
                UnitFile(file.uri, file.digest, r.rows, file.label)
                for r in unit.ranges
                for file in [inputs.files[r.file]]
            ),
            inputs.source,
        )
        for unit in inputs.units
    ]


@dataclass(frozen=True, slots=True)
class JobInputs:
    """The data sources of a select job: targets by key, and the held-out files of those that have
    some of their own.
    """

    pool: Inputs
    targets: dict[str, Inputs]
    heldouts: dict[str, Inputs]
    benchmarks: tuple[Inputs, ...] = ()
    takedown: TakedownLists | None = None

    def identity(self) -> list[Any]:
        found: list[Any] = [self.pool.identity()]
        for key, target in self.targets.items():
            heldout = self.heldouts.get(key)
            name = [] if key == "target" else [key]
            found += [*name, target.identity(), heldout and heldout.identity()]
        others = [one.identity() for one in self.benchmarks]
        taken = self.takedown.digest if self.takedown else None
        return [*found, *([others, taken] if others or taken else [])]


@dataclass(frozen=True, slots=True)
class Listing:
    """The files that a select job reads."""

    pool: list[FileInfo]
    targets: dict[str, list[FileInfo]]
    heldouts: dict[str, list[FileInfo]]
    benchmarks: list[list[FileInfo]]
    exclude: dict[str, list[FileInfo]]

    @property
    def all(self) -> list[list[FileInfo]]:
        """The files by data source."""
        domains = [*self.targets.values(), *self.heldouts.values()]
        return [self.pool, *domains, *self.benchmarks, *self.exclude.values()]


def list_job_inputs(spec: SelectSpec) -> Listing:
    """List all data sources of a job.

    Raises:
        InputError: a path matches nothing.
    """
    return Listing(
        list_source(spec.pool),
        {key: list_source(one) for key, one in spec.domains.items()},
        {key: list_source(one) for key, one in _heldout_files(spec).items()},
        [list_source(one) for one in spec.decontaminate],
        {k: list_documents(v) for k, v in spec.exclude.lists.items()} if spec.exclude else {},
    )


def _heldout_files(spec: SelectSpec) -> dict[str, DataSource]:
    """The held-out sources that have files of their own, by the key of their target."""
    held = {key: one.heldout for key, one in spec.domains.items()}
    return {key: one for key, one in held.items() if isinstance(one, DataSource)}


def open_job_inputs(
    store: Store, spec: SelectSpec, listed: Listing, *, remember: bool = True
) -> JobInputs:
    """Digest all data sources of a job; `remember` the digests in the store."""
    open_one = partial(open_inputs, store, part_tokens=spec.part_tokens, remember=remember)
    targets, heldouts = spec.domains, _heldout_files(spec)
    return JobInputs(
        open_one(spec.pool, listed.pool),
        {key: open_one(targets[key], files) for key, files in listed.targets.items()},
        {key: open_one(heldouts[key], files) for key, files in listed.heldouts.items()},
        tuple(
            open_one(one, files)
            for one, files in zip(spec.decontaminate, listed.benchmarks, strict=True)
        ),
        read_lists(spec.exclude, listed.exclude) if spec.exclude else None,
    )
