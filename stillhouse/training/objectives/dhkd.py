"""Dual-head knowledge distillation (Yang et al. 2024, arXiv 2411.08937).

    objective = gamma CE(head 1, labels) + alpha BinaryKL-Norm(head 2, teacher)

Both heads read the same features; head 2 is dropped after the training. On a conflict of the two
gradients over all parameters the distillation's component along the other is taken away
(`aligned`), which the paper uses for pairs of different architectures.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from stillhouse.training.objectives.distil import promoted


def binary_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 times the sum over classes of KL(sigmoid(t/T) || sigmoid(s/T)), mean over rows [n, C]."""
    s, t = (promoted(x) / temperature for x in (student, teacher.detach()))
    losses = t.sigmoid() * (logsigmoid(t) - logsigmoid(s))
    losses = losses + (-t).sigmoid() * (logsigmoid(-t) - logsigmoid(-s))
    return temperature**2 * losses.sum(1).mean()


def binary_kl_norm(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 times the sum over classes of KL(1/2 || sigmoid((s - t)/T)), mean over rows [n, C].

    By log-sigmoid: a clamped sigmoid is infinite in float32 from differences of about 17 T on.
    """
    z = (promoted(student) - promoted(teacher.detach())) / temperature
    losses = -torch.log(z.new_tensor(2.0)) - (logsigmoid(z) + logsigmoid(-z)) / 2
    return temperature**2 * losses.sum(1).mean()


def aligned(hard: Sequence[Tensor], soft: Sequence[Tensor]) -> list[Tensor]:
    """The two gradients added, without the part of `soft` that points against `hard`.

    Both are lists over ALL parameters, zero where a loss does not reach one, and must be summed
    over the workers before: <soft, hard> of parts is another number. Where it is negative,
    soft - (<soft, hard> / |hard|^2) hard takes the place of soft.
    """
    dot = sum((torch.dot(h.flatten(), s.flatten()) for h, s in zip(hard, soft, strict=True)))
    norm = sum(h.square().sum() for h in hard)
    assert isinstance(dot, Tensor) and isinstance(norm, Tensor)
    factor = torch.where(norm > 0, (-dot).clamp(min=0) / norm.clamp(min=1e-38), 0.0)
    return [s + (1 + factor) * h for h, s in zip(hard, soft, strict=True)]
