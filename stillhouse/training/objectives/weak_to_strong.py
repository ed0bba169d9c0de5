"""Weak-to-strong generalisation (Burns et al. 2023, arXiv 2312.09390): the confidence loss.

    L = CE(f, (1 - a) f_w + a hard_t(f))

f are the strong model's probabilities, f_w the weak labels, hard_t(f) the strong model's own
prediction, hardened at the threshold t that makes the share of each class what the weak labels
say. Targets carry no gradient. `a` rises linearly from 0 to its maximum over the first part of the
training (the paper); `released` is the schedule of the authors' code, whose warm-up is the step's
share itself, and then jumps.
"""

import torch
from torch import Tensor

from stillhouse.training.objectives.distil import promoted


def confidence_weight(
    progress: float, maximum: float, warmup: float, *, released: bool = False
) -> float:
    """The weight a at `progress` in [0, 1] of the training."""
    if released:
        return maximum * (progress if progress <= warmup else 1.0)
    return maximum * (min(1.0, progress / warmup) if warmup else 1.0)


def threshold(probs: Tensor, weak: Tensor) -> Tensor:
    """Two classes: hardened class 0 is where its probability is at least this; a scalar.

    The quantile of p(class 0) over the whole batch, at the level of the mean weak p(class 1).
    """
    return torch.quantile(probs[:, 0], weak[:, 1].mean().to(probs.dtype))


def hardened(probs: Tensor, weak: Tensor, *, rounds: int = 50) -> Tensor:
    """One-hot predictions [n, C] whose class shares are about the weak labels' mean; no gradient.

    Two classes: by `threshold`, as published. More classes (ours): log-probabilities are shifted
    by an offset for each class, so that the shares of the argmax meet the weak shares.

    Args:
        probs: of the strong model [n, C], of the whole global batch.
        weak: weak labels [n, C], of the same rows.
        rounds: of the fit of the offsets.
    """
    probs = probs.detach()
    if probs.shape[1] == 2:
        first = probs[:, 0] >= threshold(probs, weak)
        return torch.stack([first, ~first], 1).to(probs.dtype)
    wanted, size = weak.mean(0), len(probs)
    logs = probs.clamp(min=torch.finfo(probs.dtype).tiny).log()
    offsets = torch.zeros_like(wanted)
    best, best_gap = logs.argmax(1), torch.inf
    for step in range(rounds):
        chosen = (logs + offsets).argmax(1)
        shares = torch.bincount(chosen, minlength=len(wanted)).to(wanted) / size
        gap = float((shares - wanted).abs().sum())
        if gap < best_gap:
            best, best_gap = chosen, gap
        offsets = offsets + (wanted - shares) * 4 / (1 + step) ** 0.5
    return torch.nn.functional.one_hot(best, len(wanted)).to(probs.dtype)


def confidence_targets(logits: Tensor, weak: Tensor, weight: float) -> Tensor:
    """(1 - a) f_w + a hard_t(f) [n, C] for logits [n, C]; no gradient."""
    weak = weak.detach()
    return (1 - weight) * weak + weight * hardened(promoted(logits).softmax(1), promoted(weak))


def soft_label_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy, a scalar, of logits [n, C] against distributions [n, C]."""
    return -(targets * promoted(logits).log_softmax(1)).sum(1).mean()
