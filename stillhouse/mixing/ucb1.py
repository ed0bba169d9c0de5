"""UCB1-FLAD (Albalak, Raffel, Wang 2023, arXiv 2302.00674): play the highest upper bound.

    index_a = rbar_a + sqrt(2 ln(rounds) / n_a),   rounds = micro-batches so far + K

An initial pass over all arms gives rbar and counts as one play of each. Counts advance with each
micro-batch, rbar only at optimiser steps, as a moving average because rewards drift.
"""

from collections.abc import Mapping

import numpy as np
from pydantic import Field

from stillhouse.mixing.policy import (
    Distribution,
    MixFacts,
    RewardPolicy,
    Smoothing,
    State,
    smooth,
)


class Ucb1(RewardPolicy):
    """UCB1-FLAD: plays the arm with the highest upper confidence bound."""

    smoothing: Smoothing = Field(
        default=0.1, description="of rewards, which drift while the model learns; as published"
    )

    def start(self, facts: MixFacts) -> State:
        """rbar of the initial pass, and counts n of one play each."""
        rewards = np.array(facts.initial_rewards, dtype=np.float64)
        return {"mean_reward": rewards, "counts": np.ones(len(rewards), dtype=np.int64)}

    def indices(self, state: State) -> Distribution:
        """Upper confidence bound of each arm: float64[K]."""
        counts = state["counts"]
        return state["mean_reward"] + np.sqrt(2 * np.log(counts.sum()) / counts)

    def probabilities(self, state: State) -> Distribution:
        """One-hot of the first best arm."""
        choice = np.zeros(len(state["counts"]))
        choice[np.argmax(self.indices(state))] = 1
        return choice

    def play(self, state: State, uniform: float) -> int:
        """The best arm, whatever `uniform` is. The arm's count advances."""
        arm = int(np.argmax(self.indices(state)))
        state["counts"][arm] += 1
        return arm

    def update(self, state: State, rewards: Mapping[int, float]) -> None:
        """Move the averages of the window's arms."""
        smooth(state["mean_reward"], rewards, self.smoothing)
