"""Every arm alike, FLAD's explore-only baseline; or none at all."""

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from stillhouse.mixing.plan import StepPlan
from stillhouse.mixing.policy import MixFacts, PolicySettings
from stillhouse.mixing.static import Static


class UniformSettings(PolicySettings):
    """Every arm alike."""

    name: Literal["uniform"]
    target_pass: bool = Field(
        default=False, description="every step also holds all of the target's training half"
    )

    def plan(self, target_batches: int) -> StepPlan:
        """The target's pass where the spec asks for it; nothing is rewarded."""
        return StepPlan(target_batches if self.target_pass else 0)

    def make(self, facts: MixFacts) -> Static:
        """1 / K each."""
        return Static(np.ones(len(facts.arms)))


class TargetOnlySettings(PolicySettings):
    """No arm is drawn: the target's training half alone."""

    name: Literal["target_only"]

    draws_arms: ClassVar[bool] = False

    def plan(self, target_batches: int) -> StepPlan:
        """A pass over the target."""
        return StepPlan(target_batches)

    def make(self, facts: MixFacts) -> Static:
        """Nobody draws from it."""
        return Static(np.ones(len(facts.arms)))
