"""Distiller (He et al. 2021, arXiv 2109.11105): losses on hidden states of matched layers.

    objective = w_kd L(logits) + sum over pairs of layers w l(student layer, teacher layer)

Pairs of layers come from `layer_pairs` (skip, last) or from a transport plan (emd). Of the losses
l, `mi` maximises a lower bound of the mutual information of student and teacher states (MI-alpha,
after Poole et al. 2019): alpha = 1 has low variance and is at most log B, alpha = 0 rests on a
learned baseline and has high variance.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from stillhouse.training.objectives.distil import promoted


def logit_mse(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean of ((s - t) / T)^2 over all logits [n, C]: a scalar."""
    return ((promoted(student) - promoted(teacher.detach())) / temperature).square().mean()


def hidden_mse(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean squared difference over the positions [B, T] that count and the width of [B, T, H]."""
    squares = (promoted(student) - promoted(teacher.detach())).square().mean(-1)
    return (squares * mask).sum() / mask.sum()


def hidden_cosine(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean of 1 - cosine over the positions that count."""
    cosines = cosine_similarity(promoted(student), promoted(teacher.detach()), dim=-1)
    return ((1 - cosines) * mask).sum() / mask.sum()


def hidden_cross_entropy(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean cross-entropy between softmaxes over the width, at the positions that count."""
    target = promoted(teacher.detach()).softmax(-1)
    losses = -(target * promoted(student).log_softmax(-1)).sum(-1)
    return (losses * mask).sum() / mask.sum()


def hidden_pkd(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Squared distance of the normalised states of position 0, mean over the batch; no mask."""
    first = normalize(promoted(student[:, 0]), dim=-1)
    return (first - normalize(promoted(teacher[:, 0].detach()), dim=-1)).square().sum(-1).mean()


HIDDEN_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "mse": hidden_mse,
    "cos": hidden_cosine,
    "ce": hidden_cross_entropy,
    "pkd": hidden_pkd,
}


def layer_pairs(
    strategy: str, teacher_layers: int, student_layers: int, *, attention: bool = False
) -> list[tuple[int, int]]:
    """(student, teacher) indices by `skip` or `last`.

    Hidden states have the embeddings' output at 0, so a model of n layers has n + 1; attention has
    one entry a layer.
    """
    count = student_layers if attention else student_layers + 1
    if strategy == "last":
        return [(i, teacher_layers - student_layers + i) for i in range(count)]
    if attention:
        return [(i, (i + 1) * teacher_layers // student_layers - 1) for i in range(count)]
    return [(i, i * teacher_layers // student_layers) for i in range(count)]


def mi_alpha(scores: Tensor, log_baseline: Tensor, alpha_logit: float) -> Tensor:
    """The lower bound I_alpha in nats, a scalar, of critic scores [B, B] and log baselines [B].

        b_ij = log(alpha m_ij + (1 - alpha) exp(q_i)),  m_ij = mean over k != j of exp(f_ik)
        I = 1 + mean_{i != j}(f_ii - b_ij) - mean_{i != j} exp(f_ij - b_ii)

    Args:
        scores: f_ij of student i and teacher j; the diagonal holds the pairs that belong together.
        log_baseline: q, learned.
        alpha_logit: logit of alpha.
    """
    scores, log_baseline = promoted(scores), promoted(log_baseline)
    size = len(scores)
    diagonal = torch.eye(size, dtype=torch.bool, device=scores.device)
    others = scores[:, None, :].masked_fill(diagonal[None], -torch.inf)
    log_mean = others.logsumexp(-1) - math.log(size - 1)
    alpha = torch.tensor(alpha_logit, dtype=scores.dtype, device=scores.device)
    log_alpha = nn.functional.logsigmoid(alpha)
    log_rest = nn.functional.logsigmoid(-alpha)
    bias = torch.logaddexp(log_alpha + log_mean, log_rest + log_baseline[:, None].expand_as(scores))
    own = scores.diagonal()
    joint = (own[:, None] - bias)[~diagonal].mean()
    marginal = (scores - bias.diagonal()[:, None]).exp()[~diagonal].mean()
    return 1 + joint - marginal
