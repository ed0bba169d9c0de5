"""Hybrid distillation (Shi et al. 2023, arXiv 2306.15876): two teachers for a vision transformer.

The student imitates the token relations of a masked-image teacher and the features of a supervised
one. The exact forms could not be had; relations as KL of softmaxed Q K^T / sqrt(d) and features as
smooth L1 of layer-normalised tokens are our reading. The two diagnostics tell the teachers apart.
"""

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, smooth_l1_loss

from stillhouse.training.objectives.distil import promoted


def relation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student), mean over rows, of attention scores [B, heads, T, T]: a scalar."""
    target, own = (promoted(scores).log_softmax(-1) for scores in (teacher.detach(), student))
    return (target.exp() * (target - own)).sum(-1).mean()


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 of tokens [B, T, H], each normalised over its width: a scalar."""
    own, target = (layer_norm(promoted(x), x.shape[-1:]) for x in (student, teacher.detach()))
    return smooth_l1_loss(own, target)


def attention_distance(attention: Tensor, grid: int) -> Tensor:
    """Mean distance in patches that each head looks at: [heads].

    Args:
        attention: probabilities [heads, grid^2, grid^2] of patches, rows are queries.
        grid: patches on each side.
    """
    axis = torch.arange(grid, dtype=attention.dtype, device=attention.device)
    places = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).flatten(0, 1)
    return (attention * torch.cdist(places, places)).sum(-1).mean(-1)


def attention_nmi(attention: Tensor) -> Tensor:
    """Normalised mutual information of queries and keys: [heads] of [heads, T, T].

    Queries are uniform and p(key | query) is the attention: I(q; k) / sqrt(H(q) H(k)).
    """
    size = attention.shape[-1]
    joint = attention / size
    keys = joint.sum(-2)
    information = torch.special.xlogy(joint, joint * size) - torch.special.xlogy(
        joint, keys[:, None]
    )
    entropy = -torch.special.xlogy(keys, keys).sum(-1)
    queries = torch.log(attention.new_tensor(float(size)))
    return information.sum((-2, -1)) / (queries * entropy).sqrt()
