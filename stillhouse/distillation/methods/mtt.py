"""MTT and TESLA: trajectory matching as published, and at half the cost of a step."""

from typing import ClassVar

from stillhouse.distillation.matching import TrajectoryMethod
from stillhouse.spec import Count


class Mtt(TrajectoryMethod):
    """Matching training trajectories (Cazenavette et al. 2022), with the exact gradient."""


class Tesla(TrajectoryMethod):
    """MTT with TESLA's gradient (Cui et al. 2023), which leaves out second-order terms."""

    first_order: ClassVar[bool] = True
    num_steps: Count = 50
