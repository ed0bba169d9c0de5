"""Loss scaling: arms drawn alike, each one's loss multiplied by its smoothed reward.

A control that spends a bandit's rewards without a bandit (a baseline of FLAD's paper):

    rbar_a <- (1 - beta) rbar_a + beta reward_a
    loss = (max(rbar_a, 0) + 1e-6) * mean token loss

Ours: the maximum. As published, a negative cosine makes a negative loss, which unlearns the arm.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

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

_LEAST = 1e-6


class LossScaling(RewardPolicy):
    """Arms drawn alike, each one's loss multiplied by its smoothed reward."""

    weights_losses: ClassVar[bool] = True

    smoothing: Smoothing = Field(default=0.1, description="of rewards")

    def start(self, facts: MixFacts) -> State:
        """rbar of the initial pass."""
        return {"mean_reward": np.array(facts.initial_rewards, dtype=np.float64)}

    def probabilities(self, state: State) -> Distribution:
        """1/K each."""
        return np.full(len(state["mean_reward"]), 1 / len(state["mean_reward"]))

    def loss_weights(self, state: State, arms: Sequence[int]) -> Distribution:
        """What the mean loss of each arm is multiplied by, in every step: float64[K]."""
        return np.maximum(state["mean_reward"], 0) + _LEAST

    def update(self, state: State, rewards: Mapping[int, float]) -> None:
        """Move the averages of the window's arms."""
        smooth(state["mean_reward"], rewards, self.smoothing)
