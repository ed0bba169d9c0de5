"""AdamW and learning-rate schedules that end where the tokens end."""

import math

import torch
from torch import nn

from stillhouse.spec import Optimisation

_WSD_DECAY = 0.2  # share of the steps


def learning_rate(step: int, num_steps: int, settings: Optimisation) -> float:
    """The learning rate of step 0 .. num_steps-1.

    Linear warm-up that reaches the peak at its last step, then
    cosine: half a cosine to `final_learning_rate * peak`, reached at the last step;
    wsd: the peak, then a line to the same end over the last fifth of the steps;
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
    """Fused AdamW; weight decay on matrices alone, not on norms and biases."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=settings.peak_rate, betas=settings.betas, eps=settings.eps, fused=True
    )


def make_adafactor(model: nn.Module, settings: Optimisation) -> torch.optim.Optimizer:
    """Adafactor as FLAD trains with: the given learning rate, no first moment.

    Shazeer, Stern (2018), with relative steps and scaling by parameters off; `betas` and `eps` are
    not read.
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
