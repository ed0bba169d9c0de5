"""Optimisers, learning-rate schedules that end where the tokens end, and divergence checks."""

import math
from collections.abc import Sequence
from statistics import fmean, variance

import torch
from torch import nn

from stillhouse.spec import Optimisation

_WSD_DECAY = 0.2  # share of the steps


def learning_rate(step: int, num_steps: int, settings: Optimisation) -> float:
    """The learning rate of step 0 .. num_steps-1.

    Linear warm-up that reaches the peak at its last step, then
    cosine: half a cosine to `final_learning_rate * peak`, reached at the last step;
    wsd: the peak, then linear to the same end over the last fifth of the steps;
    constant: the peak.
    """
    peak, end = settings.peak_rate, settings.peak_rate * settings.final_learning_rate
    warmup = math.ceil(settings.warmup * num_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if settings.schedule == "constant":
        return peak
    if settings.schedule == "cosine":
        done = (step + 1 - warmup) / (num_steps - warmup)
        return end + (peak - end) * (1 + math.cos(math.pi * done)) / 2
    decay = min(math.ceil(_WSD_DECAY * num_steps), num_steps - warmup)
    return end + (peak - end) * min(1.0, (num_steps - 1 - step) / decay)


def make_optimizer(model: nn.Module, settings: Optimisation) -> torch.optim.AdamW:
    """Fused AdamW; weight decay on matrices only, not on norms and biases."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=settings.peak_rate, betas=settings.betas, eps=settings.eps, fused=True
    )


def make_adafactor(model: nn.Module, settings: Optimisation) -> torch.optim.Optimizer:
    """Adafactor (Shazeer, Stern 2018) as in FLAD: the given learning rate, no first moment.

    Relative steps and scaling by parameters are off; `betas` and `eps` are not used.
    """
    from transformers.optimization import Adafactor

    return Adafactor(
        [p for p in model.parameters() if p.requires_grad],
        lr=settings.peak_rate,
        weight_decay=settings.weight_decay,
        scale_parameter=False,
        relative_step=False,
        warmup_init=False,
    )


class LossGuard:
    """Detects a loss that explodes: NaN, infinite, or 3 nats (20 times the perplexity) above the
    mean of about the last fifty steps, from step 20 on.

    Attributes:
        mean: the exponential mean, in nats; 0 before the first loss.
    """

    def __init__(self) -> None:
        self.mean, self._steps = 0.0, 0

    def exploded(self, loss: float) -> bool:
        """Add a step's loss, unless it exploded."""
        if not math.isfinite(loss) or (self._steps >= 20 and loss > self.mean + 3.0):
            return True
        self._steps += 1
        keep = min(0.98, 1 - 1 / self._steps)
        self.mean = keep * self.mean + (1 - keep) * loss
        return False

    def state_dict(self) -> dict[str, float]:
        return {"mean": self.mean, "steps": self._steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.mean, self._steps = state["mean"], int(state["steps"])


def late_fall(losses: Sequence[float]) -> float | None:
    """Nats by which the mean of the last tenth of the losses is below that of the tenth before.

    0 where the two are within two standard errors of each other; None below 20 losses.
    """
    tenth = len(losses) // 10
    if tenth < 2:
        return None
    before, last = losses[-2 * tenth : -tenth], losses[-tenth:]
    fall = fmean(before) - fmean(last)
    noise = math.sqrt((variance(before) + variance(last)) / tenth)
    return fall if fall > 2 * noise else 0.0
