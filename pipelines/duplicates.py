"""What is left out of scanned sources: later copies of a text, and the other side of a split."""

from collections.abc import Sequence
from dataclasses import dataclass

from stillhouse.pipelines.context import Context, Step, perform
from stillhouse.storage.artifact import PartRef, Receipt
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
class Drops:
    """What the units of a source drop.

    Attributes:
        blocks: receipts with the digests and rows of `block_units` units each, in order.
        tasks: names of all tasks that found it.
    """

    blocks: Sequence[Receipt] = ()
    block_units: int = UNITS_A_BLOCK
    tasks: tuple[str, ...] = ()

    def of(self, number: int) -> tuple[str, PartRef | None]:
        """The digest of the rows that unit `number` drops, and the table that has them, if any."""
        index = number // self.block_units
        if index < len(self.blocks):
            block = self.blocks[index]
            if str(number) in block.info["units"]:
                return block.info["units"][str(number)], block.parts[0]
        return NOTHING_DROPPED, None


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
