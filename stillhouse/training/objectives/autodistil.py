"""AutoDistil (Xu et al. 2022, arXiv 2201.12507): one super-network, many small students.

A sub-network uses the leading rows and columns of every matrix. Each step trains the largest, the
smallest and two random sub-networks on the relations of the last layer: Q, K and V are cut into
relation heads, and Q Q^T, K K^T, V V^T (over sqrt d) compared with the teacher's.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from stillhouse.training.objectives.distil import promoted


@dataclass(frozen=True, slots=True, order=True)
class SubNetwork:
    """The sizes of a student."""

    layers: int
    heads: int
    hidden: int
    mlp_ratio: float


def search_space(
    layers: Sequence[int],
    heads: Sequence[int],
    hidden: Sequence[int],
    mlp_ratios: Sequence[float],
    num_params: Callable[[SubNetwork], float],
) -> list[SubNetwork]:
    """All combinations, from the smallest number of parameters to the largest."""
    combined = (SubNetwork(*sizes) for sizes in product(layers, heads, hidden, mlp_ratios))
    return sorted(combined, key=lambda one: (num_params(one), one))


def sandwich(space: Sequence[SubNetwork], step: int, num_random: int = 2) -> list[SubNetwork]:
    """The sub-networks of a step: the largest, the smallest, random others; the same anywhere."""
    draws = random.Random(step).sample(list(space[1:-1]), num_random)
    return [space[-1], space[0], *draws]


def relations(states: Tensor, num_heads: int = 12) -> Tensor:
    """States [B, T, W] -> scores [B, heads, T, T] of the relation heads, over sqrt(d).

    W is cut to a multiple of `num_heads`.
    """
    width = states.shape[-1] // num_heads
    cut = states[..., : width * num_heads].unflatten(-1, (num_heads, width)).transpose(1, 2)
    return cut @ cut.transpose(-1, -2) / width**0.5


def relation_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    num_heads: int = 12,
    softmaxed: bool = False,
) -> Tensor:
    """Mean squared error of the relations of Q, K and V [B, T, W], added up: a scalar.

    `softmaxed` compares them by KL after a softmax, as the papers of this family state.
    """
    losses = list[Tensor]()
    for own, other in zip(student, teacher, strict=True):
        mine, theirs = (relations(promoted(x), num_heads) for x in (own, other.detach()))
        if softmaxed:
            log_theirs, log_mine = theirs.log_softmax(-1), mine.log_softmax(-1)
            losses.append((log_theirs.exp() * (log_theirs - log_mine)).sum(-1).mean())
        else:
            losses.append((mine - theirs).square().mean())
    return torch.stack(losses).sum()
