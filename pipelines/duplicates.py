"""What is left out of scanned sources: later copies of a text, and the other side of a split."""

from collections.abc import Sequence
from dataclasses import dataclass

from stillhouse.pipelines.context import Context, Step, perform
from stillhouse.storage.artifact import Part, Receipt, Store
from stillhouse.storage.task import Task
from stillhouse.text.duplicates import (
    DOCUMENTS_A_RANGE,
    NOTHING_DROPPED,
    UNITS_A_BLOCK,
    DropsTask,
    DuplicatesTask,
    HashesTask,
    SplitTask,
    unit_batches,
)


@dataclass(frozen=True, slots=True)
class UnitDrops:
    """What one unit drops: the digest of the set of rows, and where they are listed, if any."""

    digest: str
    listed: Receipt | None

    def table(self, store: Store) -> Part | None:
        """The table with its rows among those of other units; None without any."""
        if self.listed is None:
            return None
        [ref] = self.listed.parts
        uri = store.path(ref.path)
        return Part(uri, ref.num_rows, ref.num_tokens, ref.num_bytes, ref.sha256)


@dataclass(frozen=True, slots=True)
class Drops:
    """What the units of a source drop.

    Attributes:
        blocks: receipts with the digests and rows of `block_units` units each, in order.
        tasks: names of all tasks that found it.
    """

    blocks: Sequence[Receipt] = ()
    block_units: int = UNITS_A_BLOCK
    tasks: tuple[str, ...] = ()

    def of(self, number: int) -> UnitDrops:
        """What unit `number` drops."""
        index = number // self.block_units
        if index < len(self.blocks):
            digest = self.blocks[index].info["units"].get(str(number))
            if digest is not None:
                return UnitDrops(digest, self.blocks[index])
        return UnitDrops(NOTHING_DROPPED, None)


def find_duplicates(ctx: Context, where: str, scans: Sequence[Receipt]) -> Drops:
    """Find the later copies of texts in a source; `where` is said in the names of the steps."""

    def done(title: str, unit: str, tasks: Sequence[Task]) -> list[Receipt]:
        return perform(ctx, Step(f"{title}{where}", tasks, unit=unit))

    hashes = done("hashes", "batches", [HashesTask(batch) for batch in unit_batches(scans)])
    num_ranges = -(-sum(b.counts["documents"] for b in hashes) // DOCUMENTS_A_RANGE)
    batches, numbers = tuple(hashes), range(num_ranges)
    ranges = done("duplicates", "ranges", [DuplicatesTask(batches, n, num_ranges) for n in numbers])
    num_blocks = -(-len(scans) // UNITS_A_BLOCK)
    blocks = done("drops", "blocks", [DropsTask(tuple(ranges), b) for b in range(num_blocks)])
    return Drops(blocks, tasks=tuple(one.task for one in (*hashes, *ranges, *blocks)))


def split_target(
    ctx: Context, scans: Sequence[Receipt], share: float, deduplicate: bool
) -> tuple[Drops, Drops]:
    """Split a target: what its training side drops, and what its held-out side does."""
    tasks = [SplitTask(tuple(scans), share, deduplicate, held_out) for held_out in (False, True)]
    train, held = (
        Drops([receipt], len(scans), (receipt.task,))
        for receipt in perform(ctx, Step("split target", tasks, unit="sides"))
    )
    return train, held
