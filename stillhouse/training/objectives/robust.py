"""Robust self-supervised training (arXiv 2310.00027): unlabelled data of a nearby domain.

    phi_g(x, y) = sup_z l(z, y) - g c(z, x)
    objective   = mean phi_gamma(x, y) over labelled
                + lambda * mean phi_gamma'(x', own decision) over unlabelled

Start from the labelled solution: from a random one the second term finds any gap between clusters.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def linear_margin(decision: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """phi [n] of a linear classifier with 0-1 loss and Euclidean cost.

    Args:
        decision: f(x) = theta . x / |theta|, [n].
        labels: -1 or 1, [n].
        gamma: the price of a unit of distance.
    """
    return (1 - gamma * labels * decision).clamp(0, 1)


def own_labels(decision: Tensor) -> Tensor:
    """The model's decisions as labels -1 or 1, [n]; 1 at 0. No gradient."""
    return torch.where(decision.detach() >= 0, 1.0, -1.0).to(decision.dtype)


def linear_objective(
    theta: Tensor,
    labelled: tuple[Tensor, Tensor],
    unlabelled: Tensor,
    gammas: tuple[float, float],
    weight: float,
) -> Tensor:
    """The objective, a scalar, of a direction theta [d] of any length."""
    direction = theta / theta.norm()
    x, y = labelled
    first, other = x @ direction, unlabelled @ direction
    supervised = linear_margin(first, y.to(first.dtype), gammas[0]).mean()
    return supervised + weight * linear_margin(other, own_labels(other), gammas[1]).mean()


def worst_case(
    loss: Callable[[Tensor], Tensor], inputs: Tensor, gamma: float, steps: int = 15
) -> Tensor:
    """Inputs [n, ...] moved to where loss - gamma |z - x|^2 is largest, by gradient ascent.

    One step of 1 along (0.5 / gamma) grad loss, then `steps` of 1 / sqrt(t + 2) along that
    gradient minus (z - x). It converges only where gamma exceeds the curvature of the loss.

    Args:
        loss: losses [n] of inputs, each of its own row.
        inputs: x; the result has no graph.
        gamma: the price of squared distance.
        steps: after the first one.
    """
    start = inputs.detach()

    def pull(point: Tensor) -> Tensor:
        point = point.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(point).sum(), point)
        return gradient * (0.5 / gamma)

    moved = start + pull(start)
    for step in range(steps):
        moved = moved + (pull(moved) - (moved - start)) / (step + 2) ** 0.5
    return moved.detach()
