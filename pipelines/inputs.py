"""What goes in: the listing of a data source, its content digests, and the units of work."""

from collections.abc import Sequence
from dataclasses import dataclass

from stillhouse.errors import InputError
from stillhouse.fingerprint import fingerprint
from stillhouse.spec import DataSource, SelectSpec
from stillhouse.storage.artifact import Store
from stillhouse.storage.digests import digest_files
from stillhouse.storage.filesystem import list_files
from stillhouse.text.tasks import UnitFile, UnitTask
from stillhouse.text.units import InputFile, Unit, group_units

SCAN_VERSION = 1
SUFFIXES = {
    "parquet": (".parquet", ".pq"),
    "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst", ".ndjson"),
    "text": (".txt", ".md", ".rst"),
}
_BYTES_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class Inputs:
    """The files of one data source in sorted order, and the units they are worked on in."""

    source: DataSource
    files: tuple[InputFile, ...]
    units: tuple[Unit, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all files as stored."""
        return sum(file.size_bytes for file in self.files)

    def identity(self) -> str:
        """Fingerprint of content and of the settings that decide what is read from it."""
        return fingerprint([reading_identity(self.source), [f.digest for f in self.files]])


def reading_identity(source: DataSource) -> dict[str, object]:
    """The settings of a source that change which documents come out of its bytes."""
    return source.model_dump(include={"format", "columns", "source", "max_chars", "skip_bad_files"})


def open_inputs(
    store: Store, source: DataSource, part_tokens: int, *, remember: bool = True
) -> Inputs:
    """List a data source and digest its files (from the cache where they are unchanged).

    Raises:
        InputError: nothing matches, or all files are empty.
    """
    found = list_files(source.paths, _suffixes(source))
    if not any(info.size_bytes for info in found):
        raise InputError(f"all files of {source.path!r} are empty")
    digests = digest_files(store, found, remember=remember)
    unit_bytes = part_tokens * _BYTES_PER_TOKEN
    files = tuple(
        InputFile(
            info.uri,
            info.name,
            info.size_bytes,
            digest.sha256,
            digest.row_group_rows if info.size_bytes > unit_bytes else None,
        )
        for info, digest in zip(found, digests, strict=True)
    )
    return Inputs(source, files, tuple(group_units(files, unit_bytes=unit_bytes)))


def _suffixes(source: DataSource) -> Sequence[str]:
    if source.format != "auto":
        return SUFFIXES[source.format]
    return [suffix for group in SUFFIXES.values() for suffix in group]


def unit_tasks(inputs: Inputs) -> list[UnitTask]:
    """A scan task for each unit, named by content."""
    reading = reading_identity(inputs.source)
    return [
        UnitTask(
            fingerprint=fingerprint(["scan", SCAN_VERSION, reading, unit.identity(inputs.files)]),
            index=index,
            files=tuple(
                UnitFile(inputs.files[r.file].uri, inputs.files[r.file].digest, r.rows)
                for r in unit.ranges
            ),
            source=inputs.source,
        )
        for index, unit in enumerate(inputs.units)
    ]


@dataclass(frozen=True, slots=True)
class JobInputs:
    """All that a select job reads from outside its store."""

    pool: Inputs
    target: Inputs
    heldout: Inputs | None
    """Where the held-out part has files of its own."""

    def identity(self) -> list[str | None]:
        """Fingerprints of all inputs."""
        return [x.identity() if x else None for x in (self.pool, self.target, self.heldout)]


def open_job_inputs(store: Store, spec: SelectSpec, *, remember: bool = True) -> JobInputs:
    """The inputs of a select job.

    Raises:
        InputError: a path matches nothing.
    """
    heldout = spec.target.heldout
    return JobInputs(
        open_inputs(store, spec.pool, spec.part_tokens, remember=remember),
        open_inputs(store, spec.target, spec.part_tokens, remember=remember),
        open_inputs(store, heldout, spec.part_tokens, remember=remember)
        if isinstance(heldout, DataSource)
        else None,
    )
