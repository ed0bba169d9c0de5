"""Mixtures that do not change, to compare the bandits with: given, by size, by alignment."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field, model_validator

from stillhouse.errors import SpecError
from stillhouse.mixing.plan import StepPlan
from stillhouse.mixing.policy import (
    Law,
    MixFacts,
    Policy,
    PolicySettings,
    Positive,
    normalise,
    softmax,
)
from stillhouse.settings import Count


class StaticSettings(PolicySettings):
    """One mixture for the whole run. Give exactly one of the three."""

    name: Literal["static"]
    weights: dict[str, Annotated[float, Field(ge=0)]] | None = Field(
        default=None, description="by arm, any scale; arms left out are not drawn"
    )
    size_temperature: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="sizes ** this: 1 as the data lie, 0 uniform"
    )
    alignment_temperature: Positive | None = Field(
        default=None, description="softmax of the initial alignment / this; published: 1"
    )
    parameters: str = Field(default="output_head", description="gradients compared for alignment")
    initial_examples: Count = Field(default=1000, description="of each arm for alignment")
    target_pass: bool = Field(
        default=False, description="every step also holds all of the target's training half"
    )

    @model_validator(mode="after")
    def _one_of(self) -> "StaticSettings":
        given = [self.weights, self.size_temperature, self.alignment_temperature]
        if sum(rule is not None for rule in given) != 1:
            raise ValueError(
                "give exactly one of `weights`, `size_temperature`, `alignment_temperature`"
            )
        if self.weights is not None and not sum(self.weights.values()) > 0:
            raise ValueError("`weights` need at least one above 0")
        return self

    @property
    def needs_initial_pass(self) -> bool:
        """Where the mixture follows from the alignment."""
        return self.alignment_temperature is not None

    def plan(self, target_batches: int) -> StepPlan:
        """The target's pass where the spec asks for it; nothing is rewarded."""
        batches = target_batches if self.target_pass else 0
        return StepPlan(batches, None, "before_step", self.parameters)

    def make(self, facts: MixFacts) -> "Static":
        """The mixture.

        Raises:
            SpecError: `weights` name an arm that is not there.
        """
        if self.weights is not None:
            unknown = sorted({*self.weights} - {*facts.arms})
            if unknown:
                raise SpecError(
                    f"`policy.weights` names arms that are not in `auxiliary`: {unknown}"
                )
            return Static([self.weights.get(arm, 0.0) for arm in facts.arms])
        if self.size_temperature is not None:
            return Static(by_size(facts.sizes, self.size_temperature))
        assert self.alignment_temperature is not None
        return Static(by_alignment(facts.initial_rewards, self.alignment_temperature))


class Static(Policy):
    """One law for the whole run, from weights of any scale: [K]."""

    def __init__(self, weights: ArrayLike) -> None:
        self._law = normalise(weights)

    def probabilities(self) -> Law:
        """The law: float64[K]."""
        return self._law.copy()

    def update(self, rewards: Mapping[int, float]) -> None:
        """Nothing is learnt."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing changes."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing changes."""


def by_size(sizes: ArrayLike, temperature: float) -> Law:
    """In proportion to sizes ** temperature: 1 as the data lie, 0 uniform: [K] -> float64[K]."""
    return softmax(temperature * np.log(np.asarray(sizes, dtype=np.float64)))


def by_alignment(alignment: ArrayLike, temperature: float) -> Law:
    """FLAD's exploit-only baseline: softmax(alignment / temperature): [K] -> float64[K].

    Alignments lie in [-1, 1], so the published temperature of 1 is nearly uniform.
    """
    return softmax(np.asarray(alignment, dtype=np.float64) / temperature)
