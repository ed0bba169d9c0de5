"""When a training has to stop, and whether it stopped too early: what the losses alone say."""

import math
from collections.abc import Sequence
from statistics import fmean, variance

_NATS = 3.0  # above the mean: twenty times its perplexity
_STEPS = 20  # before which the mean means nothing
_DECAY = 0.98  # a mean over about the last fifty steps


class LossGuard:
    """Follows the loss of every step. State: the running mean and the steps in it."""

    def __init__(self) -> None:
        self._mean, self._steps = 0.0, 0

    @property
    def mean(self) -> float:
        """The mean of the last fifty losses or so, in nats; 0 before the first."""
        return self._mean

    def exploded(self, loss: float) -> bool:
        """Take a loss; whether it is not finite, or 3 nats above the mean after 20 steps."""
        if not math.isfinite(loss) or (self._steps >= _STEPS and loss > self._mean + _NATS):
            return True
        self._steps += 1
        keep = min(_DECAY, 1 - 1 / self._steps)
        self._mean = keep * self._mean + (1 - keep) * loss
        return False

    def state_dict(self) -> dict[str, float]:
        """Mean and number of steps."""
        return {"mean": self._mean, "steps": self._steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from there."""
        self._mean, self._steps = state["mean"], int(state["steps"])


def late_fall(losses: Sequence[float]) -> float | None:
    """Nats by which the mean of the last tenth of the losses lies under that of the tenth before.

    0 where the two are within two standard errors of each other; None below 20 losses.
    """
    tenth = len(losses) // 10
    if tenth < 2:
        return None
    before, last = losses[-2 * tenth : -tenth], losses[-tenth:]
    fall = fmean(before) - fmean(last)
    noise = math.sqrt((variance(before) + variance(last)) / tenth)
    return fall if fall > 2 * noise else 0.0
