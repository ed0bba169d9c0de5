"""Which worker takes which micro-batches of a step: whole ones, in the order of their arms.

The G slots of a step, sorted by arm, are cut into one run for each of N workers. At most N - 1 arms
then lie on two workers or more, and only for these do gradients have to travel to be compared.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Slot:
    """One micro-batch of a step: `number` in it, the arm, and which of the arm's batches it is."""

    number: int
    arm: int
    batch: int


def slots_of(arms: Sequence[int], drawn: Mapping[int, int]) -> list[Slot]:
    """A step's slots in the order of their arms.

    Args:
        arms: drawn for the step, by slot.
        drawn: micro-batches of each arm before the step.
    """
    seen = Counter(drawn)
    slots: list[Slot] = []
    for number, arm in enumerate(arms):
        slots.append(Slot(number, arm, seen[arm]))
        seen[arm] += 1
    return sorted(slots, key=lambda slot: (slot.arm, slot.number))


def share(count: int, rank: int, size: int) -> range:
    """The run of `count` things that worker `rank` of `size` takes; sizes differ by one at most."""
    return range(count * rank // size, count * (rank + 1) // size)


def spanning(slots: Sequence[Slot], size: int) -> list[int]:
    """The arms that lie on several workers, ascending."""
    owners: dict[int, set[int]] = {}
    for rank in range(size):
        for i in share(len(slots), rank, size):
            owners.setdefault(slots[i].arm, set()).add(rank)
    return sorted(arm for arm, ranks in owners.items() if len(ranks) > 1)
