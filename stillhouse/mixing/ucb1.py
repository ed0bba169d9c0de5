"""UCB1-FLAD (Albalak, Raffel, Wang 2023, arXiv 2302.00674): play the highest upper bound.

    index_a = rbar_a + sqrt(2 ln(rounds) / n_a),   rounds = micro-batches so far + K

An initial pass over all arms gives rbar and counts as one play of each. Counts advance with each
micro-batch, rbar only at optimiser steps, as a moving average because rewards drift.
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field

from stillhouse.mixing.policy import BanditSettings, Law, MixFacts, Policy, Smoothing, smoothed


class Ucb1Settings(BanditSettings):
    """UCB1-FLAD: plays the arm with the highest upper confidence bound."""

    name: Literal["ucb1"]
    smoothing: Smoothing = Field(
        default=0.1, description="of rewards, which drift while the model learns; as published"
    )

    @property
    def needs_initial_pass(self) -> bool:
        """Every arm counts as played once."""
        return True

    def make(self, facts: MixFacts) -> "Ucb1":
        """UCB1 after the initial pass."""
        return Ucb1(facts.initial_rewards, smoothing=self.smoothing)


class Ucb1(Policy):
    """UCB1 with smoothed rewards.

    Args:
        initial_rewards: rbar from the initial pass: [K].
        smoothing: beta of the moving average, 0.1 as published.
    """

    def __init__(self, initial_rewards: ArrayLike, *, smoothing: float = 0.1) -> None:
        self._mean_reward = np.array(initial_rewards, dtype=np.float64)
        self._counts = np.ones(len(self._mean_reward), dtype=np.int64)
        self._smoothing = smoothing

    def indices(self) -> Law:
        """Upper confidence bound of each arm: float64[K]."""
        return self._mean_reward + np.sqrt(2 * np.log(self._counts.sum()) / self._counts)

    def probabilities(self) -> Law:
        """One-hot of the first best arm."""
        choice = np.zeros(len(self._counts))
        choice[np.argmax(self.indices())] = 1
        return choice

    def play(self, uniform: float) -> int:
        """The best arm, whatever `uniform` is. The arm's count advances."""
        arm = super().play(uniform)
        self.count(arm)
        return arm

    def count(self, arm: int) -> None:
        """Note a micro-batch of `arm`; `play` does it itself."""
        self._counts[arm] += 1

    def update(self, rewards: Mapping[int, float]) -> None:
        """Move the averages of the window's arms."""
        for arm, reward in rewards.items():
            self._mean_reward[arm] = smoothed(self._mean_reward[arm], reward, self._smoothing)

    def state_dict(self) -> dict[str, Any]:
        """Smoothed rewards rbar and counts n."""
        return {"mean_reward": self._mean_reward.tolist(), "counts": self._counts.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self._mean_reward = np.array(state["mean_reward"], dtype=np.float64)
        self._counts = np.array(state["counts"], dtype=np.int64)
