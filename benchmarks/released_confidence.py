"""Weak-to-strong losses as two public codes have them, to compare the faithful one with.

EleutherAI/w2s takes the threshold over its last predictions, as its batches are tiny;
openai/weak-to-strong also has a loss on the product of both models' probabilities. Both know two
classes: logits [n, 2], weak probabilities of class 1 [n]. All losses are scalars.
"""

import torch
from torch import Tensor

from stillhouse.training.objectives.weak_to_strong import soft_label_loss


def buffered_loss(
    logits: Tensor,
    weak: Tensor,
    weight: float,
    earlier: Tensor,
    *,
    size: int = 32,
    balanced: bool = False,
) -> Tensor:
    """The confidence loss whose threshold is that of the last `size` predictions.

    Args:
        logits, weak: of the batch.
        weight: of the own predictions.
        earlier: p(class 0) of the batches before.
        balanced: centre the weak log-odds first; the threshold is then the median.
    """
    if balanced:
        odds = weak.logit()
        weak = (odds - odds.mean()).sigmoid()
    first = logits.detach().softmax(1)[:, 0]
    level = weak.mean() if len(weak) > 1 and not balanced else weak.new_tensor(0.5)
    hard = first >= torch.quantile(torch.cat([earlier, first])[-size:], level)
    own = torch.stack([hard, ~hard], 1).to(logits.dtype)
    return soft_label_loss(logits, (1 - weight) * _both(weak) + weight * own)


def entropy_loss(logits: Tensor, weak: Tensor, weight: float) -> Tensor:
    """Own probabilities in place of hardened ones."""
    own = logits.detach().softmax(1)
    return soft_label_loss(logits, (1 - weight) * _both(weak) + weight * own)


def window_loss(logits: Tensor, weak: Tensor, radius: float) -> Tensor:
    """Cross-entropy of the rows that are not sure by `radius`, over the number of all."""
    unsure = logits.detach().softmax(1).amax(1) < 0.5 + radius
    return -(_both(weak) * logits.log_softmax(1)).sum(1)[unsure].sum() / len(logits)


def product_loss(logits: Tensor, weak: Tensor) -> Tensor:
    """Cross-entropy with the product of both probabilities, scaled to add up to 1."""
    target = logits.detach().softmax(1) * _both(weak)
    return soft_label_loss(logits, target / target.sum(1, keepdim=True))


def _both(weak: Tensor) -> Tensor:
    return torch.stack([1 - weak, weak], 1)
