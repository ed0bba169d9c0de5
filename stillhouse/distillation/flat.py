"""GSAM steps: experts whose trajectory runs through flat regions (FTD, Du et al. 2023).

At theta with gradient g the loss is looked at where it is worst nearby, theta + e; the part of g
that is orthogonal to the gradient g' there is what sharpens, and is stepped against:

    e = rho g / ||g||,                        plain
    e = rho theta^2 g / || |theta| g ||,      adaptive: relative to each weight's size
    direction = g' - alpha (g - (g . g'/||g'||) g'/||g'||)
"""

from collections.abc import Callable

import torch
from torch import Tensor

_EPS = 1e-12


def gsam_direction(
    gradient_at: Callable[[Tensor], Tensor],
    theta: Tensor,
    *,
    rho: float = 0.01,
    alpha: float = 0.4,
    adaptive: bool = True,
) -> Tensor:
    """What an optimiser takes in place of the gradient at theta [P]; calls `gradient_at` twice."""
    gradient = gradient_at(theta)
    if adaptive:
        step = theta.square() * gradient * (rho / ((theta.abs() * gradient).norm() + _EPS))
    else:
        step = gradient * (rho / (gradient.norm() + _EPS))
    worst = gradient_at(theta + step)
    unit = worst / (worst.norm() + _EPS)
    return worst - alpha * (gradient - torch.dot(gradient, unit) * unit)
