"""Documents hashed and counted; unusable rows become an artifact of their own, the dead letters.

The unusable rows of a unit are stored under the unit's name, with the number of the file in the
unit. The artifact of a job collects them with the files' URIs, to be fixed.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa

from stillhouse.errors import InputError
from stillhouse.fingerprint import fingerprint
from stillhouse.pipelines.context import Context, Step, perform
from stillhouse.pipelines.inputs import Inputs, JobInputs, scan_tasks
from stillhouse.settings import allowed_rows
from stillhouse.storage.artifact import Manifest, PartRef, Receipt, Store
from stillhouse.storage.layout import LAYOUT_VERSION
from stillhouse.storage.parquet import read_table
from stillhouse.text.tasks import ScanTask

DEAD_LETTERS = "dead_letters"
_PART_ROWS = 100_000
_SCHEMA = pa.schema(
    [
        ("input", pa.string()),
        ("file", pa.string()),
        ("row", pa.int64()),
        ("reason", pa.string()),
        ("preview", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Scan:
    """A scanned data source (`name` is its key in the spec): a receipt for each of its units."""

    name: str
    inputs: Inputs
    tasks: list[ScanTask]
    receipts: list[Receipt]

    @property
    def counts(self) -> Counter[str]:
        """Documents, chars and `dead: REASON`, over all units."""
        total: Counter[str] = Counter()
        for receipt in self.receipts:
            total.update(receipt.counts)
        return total

    @property
    def dead_by_reason(self) -> dict[str, int]:
        found = sorted(self.counts.items())
        return {k.removeprefix("dead: "): n for k, n in found if k.startswith("dead: ")}

    @property
    def num_dead(self) -> int:
        return sum(self.dead_by_reason.values())


@dataclass(frozen=True, slots=True)
class Scanned:
    """Data sources, and their dead letters, if any."""

    sources: list[Scan]
    dead_letters: Manifest | None


@dataclass(frozen=True, slots=True)
class ScannedJob:
    """The data sources of a select job, targets and their held-out files by the target's key."""

    pool: Scan
    targets: dict[str, Scan]
    heldouts: dict[str, Scan]
    benchmarks: list[Scan]
    dead_letters: Manifest | None

    @property
    def all(self) -> list[Scan]:
        domains = [*self.targets.values(), *self.heldouts.values()]
        return [self.pool, *domains, *self.benchmarks]


def scan(ctx: Context, inputs: JobInputs) -> ScannedJob:
    """Hash every document of the pool, the targets, the held-out files, and benchmarks.

    Raises:
        InputError: as `scan_sources`.
    """
    named = {"pool": inputs.pool, **inputs.targets}
    named |= {f"{key}.heldout": one for key, one in inputs.heldouts.items()}
    named |= {f"decontaminate.{i}": one for i, one in enumerate(inputs.benchmarks)}
    scanned = scan_sources(ctx, named)
    by_name = {one.name: one for one in scanned.sources}
    return ScannedJob(
        by_name["pool"],
        {key: by_name[key] for key in inputs.targets},
        {key: by_name[f"{key}.heldout"] for key in inputs.heldouts},
        [by_name[f"decontaminate.{i}"] for i in range(len(inputs.benchmarks))],
        scanned.dead_letters,
    )


def scan_sources(ctx: Context, named: Mapping[str, Inputs]) -> Scanned:
    """Hash every document of data sources, given by their keys in the spec.

    Raises:
        InputError: more bad rows than `max_bad_rows` allows, or no usable document at all.
    """
    tasks = {name: scan_tasks(source) for name, source in named.items()}
    every = [task for group in tasks.values() for task in group]
    step = Step("scan", every, workers=ctx.compute.packers, unit="chars")
    receipts = perform(ctx, step)
    scans: list[Scan] = []
    for name, source in named.items():
        scans.append(Scan(name, source, tasks[name], receipts[: len(tasks[name])]))
        receipts = receipts[len(tasks[name]) :]
    letters = None if ctx.dry else _put_dead_letters(ctx.store, scans)
    for scanned in scans:
        ctx.metrics("scan").dead_letters(scanned.name, scanned.num_dead)
        _check_rows(ctx.store, scanned, letters)
    return Scanned(scans, letters)


def dead_letters_uri(ctx: Context, scanned: ScannedJob) -> str | None:
    letters = scanned.dead_letters
    return ctx.store.path(DEAD_LETTERS, letters.fingerprint) if letters else None


def _check_rows(store: Store, scanned: Scan, letters: Manifest | None) -> None:
    counts, source = scanned.counts, scanned.inputs.source
    quarantined = counts["dead: unreadable file"]
    usable, dead = counts["documents"], scanned.num_dead - quarantined
    allowed = allowed_rows(source.max_bad_rows, usable + dead)
    if dead > allowed:
        first = "; ".join(
            f"{row['file']} row {row['row']}: {row['reason']}"
            for row in islice(dead_letters(store, scanned), 3)
        )
        where = f" All are in {store.path(DEAD_LETTERS, letters.fingerprint)}" if letters else ""
        raise InputError(
            f"{dead} of {usable + dead} rows of {source.path!r} cannot be used, "
            f"`max_bad_rows` allows {allowed:g}. First ones: {first}.{where}"
        )
    if not usable:
        raise InputError(f"{source.path!r} holds no usable document")
    for key, count in counts.items():
        if key.startswith("absent: ") and count == usable:
            first = next(r.info[key] for r in scanned.receipts if key in r.info)
            raise InputError(f"no row of {source.path!r} has what the spec names: {first}")


def dead_letters(store: Store, scanned: Scan) -> Iterator[dict[str, Any]]:
    """The unusable rows of a source: input, file, row (-1: all), reason, preview."""
    for task, receipt in zip(scanned.tasks, scanned.receipts, strict=True):
        if path := receipt.info.get("dead_letters"):
            for row in read_table(store.path(path)).to_pylist():
                yield row | {"input": scanned.name, "file": task.files[row["file"]].uri}


def _put_dead_letters(store: Store, scans: Sequence[Scan]) -> Manifest | None:
    """The dead letters of a job; None without any."""
    bad = [scanned for scanned in scans if scanned.num_dead]
    if not bad:
        return None
    named = [[s.name, [[t.fingerprint, [f.uri for f in t.files]] for t in s.tasks]] for s in bad]
    identity = fingerprint([DEAD_LETTERS, LAYOUT_VERSION, named])
    found = store.find_manifest(DEAD_LETTERS, identity)
    if found is not None:
        return found
    rows = (row for scanned in bad for row in dead_letters(store, scanned))
    parts: list[PartRef] = []
    while batch := list(islice(rows, _PART_ROWS)):
        path = f"{DEAD_LETTERS}/{identity}/part-{len(parts):05d}.parquet"
        table = pa.Table.from_pylist(batch, schema=_SCHEMA)
        parts.append(store.put_part(path, table, num_tokens=0))
    manifest = Manifest(
        kind=DEAD_LETTERS,
        fingerprint=identity,
        parts=tuple(parts),
        inputs={"scans": [receipt.task for scanned in bad for receipt in scanned.receipts]},
        settings={},
        totals={scanned.name: scanned.dead_by_reason for scanned in bad},
    )
    return store.put_manifest(manifest)
