"""Options that are a formula each: self-past distillation, co-teaching, ranking of losses."""

import torch
from torch import Tensor


def small_loss_rows(losses: Tensor, forget_rate: float) -> Tensor:
    """Co-teaching (Han et al. 2018, arXiv 1804.06872): rows that the other network learns from.

    The int((1 - forget_rate) n) rows of the smallest losses [n], ascending.
    """
    return losses.argsort(stable=True)[: int((1 - forget_rate) * len(losses))]


def past_slots(epoch: int, lag: int) -> tuple[int, int | None]:
    """Self-past distillation (SAF, Du et al. 2022): slots of a ring of lag + 1 epochs of logits.

    The slot that an epoch writes, and the one of `lag` epochs before; None until there is one.
    """
    return epoch % (lag + 1), (epoch - lag) % (lag + 1) if epoch >= lag else None


def ranking_loss(predicted: Tensor, losses: Tensor) -> Tensor:
    """How well scores order losses within each row, a scalar: for an amortised scorer.

    Cross-entropy over all ordered pairs of different losses: sigmoid(predicted_i - predicted_j)
    against losses_i > losses_j, both [n, m].
    """
    gaps = losses[:, :, None] - losses[:, None, :]
    wins = (predicted[:, :, None] - predicted[:, None, :]).sigmoid()
    log_wins, log_defeats = (wins + 1e-6).log(), (1 - wins + 1e-6).log()
    pairs = torch.where(gaps > 0, -log_wins, torch.where(gaps < 0, -log_defeats, 0.0))
    return pairs.sum() / (gaps != 0).sum()
