"""Fixed mixtures, the bandits' baselines: given, by size, by alignment, uniform, target only."""

from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field, model_validator

from stillhouse.errors import SpecError
from stillhouse.mixing.policy import (
    Distribution,
    MixFacts,
    Policy,
    Positive,
    State,
    StepPlan,
    normalise,
    softmax,
)
from stillhouse.settings import Count


class _Fixed(Policy):
    """One distribution for the whole run."""

    target_pass: bool = Field(
        default=False, description="every step also trains on the target's training half"
    )

    def plan(self, target_batches: int) -> StepPlan:
        return StepPlan(target_batches if self.target_pass else 0)

    def mixture(self, facts: MixFacts) -> ArrayLike:
        """Weights of any scale: [K]."""
        return np.ones(len(facts.arms))

    def start(self, facts: MixFacts) -> State:
        return {"_distribution": normalise(self.mixture(facts))}

    def probabilities(self, state: State) -> Distribution:
        return state["_distribution"].copy()


class Uniform(_Fixed):
    """Every arm with equal probability, FLAD's explore-only baseline."""


class Static(_Fixed):
    """One mixture for the whole run: one of `weights` and the two temperatures."""

    weights: dict[str, Annotated[float, Field(ge=0)]] | None = Field(
        default=None, description="by arm, at any scale; others are not drawn"
    )
    size_temperature: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="sizes ** this: 1 in proportion to sizes, 0 uniform"
    )
    alignment_temperature: Positive | None = Field(
        default=None, description="softmax of the initial alignment / this; published: 1"
    )
    parameters: str = Field(default="output_head", description="whose gradients are compared")
    initial_examples: Count = Field(default=1000, description="rows of each arm for the alignment")

    @model_validator(mode="after")
    def _one_of(self) -> "Static":
        given = [self.weights, self.size_temperature, self.alignment_temperature]
        if sum(rule is not None for rule in given) != 1:
            raise ValueError(
                "give exactly one of `weights`, `size_temperature`, `alignment_temperature`"
            )
        if self.weights is not None and not sum(self.weights.values()) > 0:
            raise ValueError("`weights` need at least one above 0")
        return self

    @property
    def first_examples(self) -> int:
        return 0 if self.alignment_temperature is None else self.initial_examples

    def plan(self, target_batches: int) -> StepPlan:
        batches = target_batches if self.target_pass else 0
        return StepPlan(batches, parameters=self.parameters)

    def mixture(self, facts: MixFacts) -> ArrayLike:
        if self.size_temperature is not None:
            return by_size(facts.sizes, self.size_temperature)
        if self.alignment_temperature is not None:
            # FLAD's exploit-only baseline; cosines lie in [-1, 1], so at 1 it is nearly uniform
            return softmax(np.asarray(facts.initial_rewards) / self.alignment_temperature)
        weights = self.weights or {}
        unknown = sorted({*weights} - {*facts.arms})
        if unknown:
            raise SpecError(f"`policy.weights` names arms that are not in `auxiliary`: {unknown}")
        return [weights.get(arm, 0.0) for arm in facts.arms]


class TargetOnly(Policy):
    """Trains on the target's training half alone."""

    draws_arms: ClassVar[bool] = False

    def plan(self, target_batches: int) -> StepPlan:
        return StepPlan(target_batches)

    def start(self, facts: MixFacts) -> State:
        return {}

    def probabilities(self, state: State) -> Distribution:
        raise AssertionError("no arm is drawn")


def by_size(sizes: ArrayLike, temperature: float) -> Distribution:
    """In proportion to sizes ** temperature (0: uniform): [K] -> float64[K]."""
    return softmax(temperature * np.log(np.asarray(sizes, dtype=np.float64)))
