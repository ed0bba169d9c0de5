"""One step of mixing while it runs, and what its micro-batches come to over all workers."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

from torch import Tensor

from stillhouse.mixing.dealing import Slot
from stillhouse.mixing.plan import RewardKind

TARGET = -1


@dataclass(frozen=True, slots=True)
class OpenStep:
    """What is fixed when a step begins: all its slots in order, this worker's, losses' factors."""

    slots: list[Slot]
    mine: list[Slot]
    shared: list[int]
    scale: float
    weights: Sequence[float] | None

    def weight(self, arm: int) -> float:
        """What a micro-batch's mean loss is multiplied by."""
        return self.scale * (1.0 if self.weights is None or arm < 0 else self.weights[arm])

    def batches(self, arm: int) -> int:
        """Micro-batches of the arm over all workers."""
        return sum(slot.arm == arm for slot in self.slots)


@dataclass(frozen=True, slots=True)
class BatchLoss:
    """Of one micro-batch: `sums` float32 [4]: NLL, tokens, excess (clipped), its tokens."""

    number: int
    arm: int
    sums: Tensor


class StepOutcome(NamedTuple):
    """Of all workers' micro-batches."""

    auxiliary: float | None
    target: float | None
    rewards: dict[int, float]


def collect(
    rows: Sequence[Any], reward: RewardKind | None, rewards: dict[int, float]
) -> StepOutcome:
    """From (arm, number, NLL, tokens, excess, its tokens) of each micro-batch."""
    means = [(arm, nll / tokens) for arm, _, nll, tokens, _, _ in rows]
    auxiliary = [mean for arm, mean in means if arm != TARGET]
    target = [mean for arm, mean in means if arm == TARGET]
    if reward in ("loss", "excess"):
        at = 2 if reward == "loss" else 4
        for arm in {row[0] for row in rows} - {TARGET}:
            own = [row for row in rows if row[0] == arm]
            rewards[arm] = sum(row[at] for row in own) / sum(row[at + 1] for row in own)
    return StepOutcome(
        fmean(auxiliary) if auxiliary else None, fmean(target) if target else None, rewards
    )
