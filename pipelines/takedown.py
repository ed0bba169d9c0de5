"""What `exclude` takes down: found in the scans of a pool, and the rows that hold it."""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import pyarrow as pa

from stillhouse.fingerprint import fingerprint, sha256
from stillhouse.pipelines.context import Context, Step, perform, run_tasks
from stillhouse.pipelines.scan import Scan
from stillhouse.selection.scorers import put_arrays
from stillhouse.selection.takedown import (
    KINDS,
    ListsHost,
    TakedownLists,
    TakedownTask,
    as_ranges,
    documents_with,
    taken_rows,
    unique_keys,
)
from stillhouse.storage.artifact import Manifest
from stillhouse.storage.parquet import read_table
from stillhouse.text.duplicates import Hashes, binary_array, hash_array
from stillhouse.text.pieces import Grain
from stillhouse.training.seen import Ranges, Rows, file_digests

STEP = "take down"


@dataclass(frozen=True)
class Takedown:
    """The documents of a pool that are taken down.

    Attributes:
        grain: of the rows that are ranked.
        hashes: sorted hashes of their texts.
        listed, found: entries by kind of list, and how many of them the pool has.
        searches: the tasks that found them.
    """

    ctx: Context
    scanned: Scan
    tokens: Manifest
    grain: Grain
    hashes: Hashes
    listed: dict[str, int]
    found: dict[str, int]
    searches: tuple[str, ...]

    @property
    def digest(self) -> str | None:
        """What decides which rows are left out; None where nothing is."""
        return sha256(self.hashes.tobytes()) if len(self.hashes) else None

    @cached_property
    def documents(self) -> Ranges:
        """Their addresses, copies included: read from the scans on workers."""
        units = [
            (receipt, [file.digest for file in task.files])
            for task, receipt in zip(self.scanned.tasks, self.scanned.receipts, strict=True)
        ]
        store = self.ctx.store
        return as_ranges(run_tasks(self.ctx, partial(documents_with, store, self.hashes), units))

    @property
    def num_documents(self) -> int:
        return sum(map(len, self.documents.values())) if self.digest else 0

    @cached_property
    def rows(self) -> dict[str, Rows]:
        """The rows of token parts that hold (a piece of) one of them, by the part's sha256: read
        once for all rules.
        """
        if self.digest is None:
            return {}
        documents, parts = self.documents, self.tokens.parts
        files = file_digests(self.tokens)
        todo = [i for i, names in enumerate(files) if not documents.keys().isdisjoint(names)]
        find = partial(taken_rows, self.ctx.store, documents, self.grain)
        found = run_tasks(self.ctx, find, [(parts[i].path, files[i]) for i in todo])
        return {parts[i].sha256: rows for i, rows in zip(todo, found, strict=True) if len(rows)}

    def put(self) -> str | None:
        """Keep the hashes as an artifact; its name, None where nothing is taken down."""
        if self.digest is None:
            return None
        name, store = fingerprint([STEP, self.digest, self.searches]), self.ctx.store
        table = pa.table({"hash": binary_array(self.hashes)})
        part = store.put_part(f"drops/{name}/part-00000.parquet", table, num_tokens=0)
        inputs = {"searches": list(self.searches)}
        store.put_manifest(Manifest("drops", name, (part,), inputs, {}, dict(self.found)))
        return name


def take_down(
    ctx: Context, lists: TakedownLists | None, scanned: Scan, tokens: Manifest, grain: Grain
) -> Takedown | None:
    """Search the pool for what the lists name; None without lists."""
    if lists is None:
        return None
    name = fingerprint([STEP, lists.digest])
    tasks = [
        TakedownTask(receipt, lists.digest, unit, lists.url_column)
        for unit, receipt in zip(scanned.tasks, scanned.receipts, strict=True)
    ]
    if not ctx.dry and ctx.store.find_manifest("models", name) is None:
        put_arrays(ctx.store, name, STEP, lists.keys)
    receipts = perform(ctx, Step(STEP, tasks, ListsHost(ctx.store.path("models", name))))
    tables = [read_table(ctx.store.path(part.path)) for r in receipts for part in r.parts]
    hashes = [np.zeros((0, 16), np.uint8), *(hash_array(table["hash"]) for table in tables)]
    pairs = (t.select(["kind", "entry"]).to_pydict().values() for t in tables)
    entries = {entry for pair in pairs for entry in zip(*pair, strict=True)}
    counts = Counter(KINDS[kind] for kind, _ in entries)
    return Takedown(
        ctx=ctx,
        scanned=scanned,
        tokens=tokens,
        grain=grain,
        hashes=unique_keys(np.concatenate(hashes)),
        listed={kind: len(keys) for kind, keys in lists.keys.items()},
        found={kind: counts[kind] for kind in lists.keys},
        searches=tuple(task.fingerprint for task in tasks),
    )
