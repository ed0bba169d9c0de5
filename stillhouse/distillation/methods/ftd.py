"""FTD: experts whose trajectory runs through flat regions, and averaged images (Du et al. 2023).

An expert takes GSAM steps, scaled to each weight's size. At theta with gradient g, the loss is
looked at where it is worst nearby, theta + e, with gradient g' there. The part of g orthogonal to
g' makes the loss sharp, and is stepped against:

    e = rho theta^2 g / || |theta| g ||
    direction = g' - alpha (g - (g . g'/||g'||) g'/||g'||)
"""

from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from stillhouse.distillation.matching import TrajectoryMethod

_EPS = 1e-12


class Ftd(TrajectoryMethod):
    """MTT on flat experts, with a running average of the images (Du et al. 2023)."""

    experts: ClassVar[Literal["plain", "smooth", "flat"]] = "flat"
    image_average: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.999, description="decay of the average of the images, which is what is kept"
    )

    @property
    def image_decay(self) -> float:
        return self.image_average


def gsam_direction(
    gradient_at: Callable[[Tensor], Tensor], theta: Tensor, *, rho: float, alpha: float
) -> Tensor:
    """What replaces the gradient at theta [P]; calls `gradient_at` twice."""
    gradient = gradient_at(theta)
    step = theta.square() * gradient * (rho / ((theta.abs() * gradient).norm() + _EPS))
    worst = gradient_at(theta + step)
    unit = worst / (worst.norm() + _EPS)
    return worst - alpha * (gradient - torch.dot(gradient, unit) * unit)
