"""FLAD's rewards: how alike the target's gradient g and an arm's gradient a are (section 3).

    alignment (GA)  = cos(g, a)                                        in [-1, 1]
    magnitude (GMS) = (2 |g||a| + 1e-8) / (|g|^2 + |a|^2 + 1e-8)       in (0, 1]
    aggregate       = (1 + GA) / 2 + GMS                               in (0, 2]

Flat 1-D tensors of any float dtype, accumulated in float32. GA does not see a gradient's scale, GMS
does: give it means on both sides, not sums over different numbers of micro-batches.
"""

from collections.abc import Callable, Iterable
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

RewardName: TypeAlias = Literal["alignment", "magnitude", "aggregate"]
Reward: TypeAlias = Callable[[Tensor, Tensor], float]

_EPS = 1e-8
_QUANTUM = 2.0**-10


def gradient_alignment(target: Tensor, auxiliary: Tensor) -> float:
    """Cosine of two gradients; 0 where one of them is zero."""
    g, a = target.float(), auxiliary.float()
    norms = torch.linalg.vector_norm(g) * torch.linalg.vector_norm(a)
    cosine = torch.where(norms == 0, 0.0, torch.dot(g, a) / norms)
    return float(cosine.clamp(-1, 1))


def gradient_magnitude_similarity(target: Tensor, auxiliary: Tensor) -> float:
    """1 where the two gradients are equally long, towards 0 where one is much longer."""
    g = torch.linalg.vector_norm(target.float())
    a = torch.linalg.vector_norm(auxiliary.float())
    return float((2 * g * a + _EPS) / (g.square() + a.square() + _EPS))


def aggregate(target: Tensor, auxiliary: Tensor) -> float:
    """Alignment, moved to [0, 1], plus similarity of magnitudes."""
    alignment = gradient_alignment(target, auxiliary)
    return (1 + alignment) / 2 + gradient_magnitude_similarity(target, auxiliary)


REWARDS: dict[RewardName, Reward] = {
    "alignment": gradient_alignment,
    "magnitude": gradient_magnitude_similarity,
    "aggregate": aggregate,
}


def quantise(reward: float) -> float:
    """The nearest multiple of 2^-10 (halves to even), so that summation order rarely matters."""
    return float(np.rint(reward / _QUANTUM) * _QUANTUM)


def initial_rewards(
    gradients: Iterable[Tensor], target: Tensor, reward: Reward
) -> NDArray[np.float64]:
    """The initial pass: the quantised reward of each arm's gradient, in turn: float64[K].

    `gradients` yields flat [P], one arm after the other, and is read lazily: one is held at a time.
    """
    return np.array([quantise(reward(target, gradient)) for gradient in gradients])
