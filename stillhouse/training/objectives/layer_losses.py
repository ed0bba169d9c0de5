"""Losses between the states of matched layers, of "Distiller" (He et al. 2021, arXiv 2109.11105).

Pairs of layers come from `layer_pairs` (skip, last), or all pairs are weighed by a transport plan
(emd). `mi` maximises a lower bound of the mutual information of student and teacher states
(MI-alpha, after Poole et al. 2019): alpha = 1 has low variance and is at most log B, alpha = 0
rests on a learned baseline and has high variance.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from stillhouse.training.objectives.distil import promoted


def logit_mse(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean over the classes of ((s - t) / T)^2, [n] of logits [n, C]."""
    return ((promoted(student) - promoted(teacher.detach())) / temperature).square().mean(1)


def hidden_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference over the width: [B, T] of states [B, T, H]."""
    return (promoted(student) - promoted(teacher.detach())).square().mean(-1)


def hidden_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine: [B, T] of states [B, T, H]."""
    return 1 - cosine_similarity(promoted(student), promoted(teacher.detach()), dim=-1)


def hidden_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy between softmaxes over the width: [B, T] of states [B, T, H]."""
    target = promoted(teacher.detach()).softmax(-1)
    return -(target * promoted(student).log_softmax(-1)).sum(-1)


STATE_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": hidden_mse,
    "cos": hidden_cosine,
    "ce": hidden_cross_entropy,
}
"""Of every position."""


def normalised_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """`pkd`: squared distance [B] of two states [B, H] of length 1."""
    own, other = (normalize(promoted(x), dim=-1) for x in (student, teacher.detach()))
    return (own - other).square().sum(-1)


def group_means(losses: Tensor, mask: Tensor, rows: int) -> Tensor:
    """Means [G] over the positions that count of groups of `rows` rows; losses, mask [B, T]."""
    kept, counts = ((x.view(-1, rows * x.shape[1])).sum(1) for x in (losses * mask, mask))
    return kept / counts.clamp(min=1)


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


def transport_plan(
    cost: Tensor, student: Tensor, teacher: Tensor, *, sharpness: float = 50.0, rounds: int = 200
) -> Tensor:
    """How much of each student layer goes to each teacher layer: [..., n, m], adding up to 1.

    Sinkhorn's iterations for the entropic transport problem, in place of a linear program: its
    plan is unique and has a gradient, and costs up to (range of the costs) / `sharpness` times the
    entropy more than the cheapest one.

    Args:
        cost: [..., n, m]; the plan depends on it without a gradient.
        student, teacher: logarithms of the layers' shares, [n] and [m].
        sharpness: the inverse of the entropy's weight, for costs scaled to [0, 1].
    """
    cost = promoted(cost.detach())
    least, most = cost.amin((-2, -1), keepdim=True), cost.amax((-2, -1), keepdim=True)
    kernel = -sharpness * (cost - least) / (most - least).clamp(min=1e-12)
    rows, columns = student[:, None], teacher[None, :]
    right = torch.zeros_like(kernel[..., :1, :])
    left = right
    for _ in range(rounds):
        left = rows - (kernel + right).logsumexp(-1, keepdim=True)
        right = columns - (kernel + left).logsumexp(-2, keepdim=True)
    return (kernel + left + right).exp()


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
    marginal = (scores - bias.diagonal()[:, None])[~diagonal].exp().mean()
    return 1 + joint - marginal
