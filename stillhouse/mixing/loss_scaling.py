"""Loss scaling: arms drawn alike, each one's loss multiplied by its smoothed reward.

A control that spends a bandit's rewards without a bandit (a baseline of FLAD's paper):

    rbar_a <- (1 - beta) rbar_a + beta reward_a
    loss = (max(rbar_a, 0) + 1e-6) * mean token loss

Ours: the maximum. As published, a negative cosine makes a negative loss, which unlearns the arm.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field

from stillhouse.mixing.policy import Law, MixFacts, Policy, RewardSettings, Smoothing, smoothed

_LEAST = 1e-6


class LossScalingSettings(RewardSettings):
    """Arms drawn alike, each one's loss multiplied by its smoothed reward."""

    name: Literal["loss_scaling"]
    smoothing: Smoothing = Field(default=0.1, description="of rewards")

    weights_losses: ClassVar[bool] = True

    @property
    def needs_initial_pass(self) -> bool:
        """The first losses are multiplied by first rewards."""
        return True

    def make(self, facts: MixFacts) -> "LossScaling":
        """Loss scaling after the initial pass."""
        return LossScaling(facts.initial_rewards, smoothing=self.smoothing)


class LossScaling(Policy):
    """Uniform draws; `loss_weights` are what learns.

    Args:
        initial_rewards: rbar from the initial pass: [K].
        smoothing: beta.
    """

    def __init__(self, initial_rewards: ArrayLike, *, smoothing: float = 0.1) -> None:
        self._mean_reward = np.array(initial_rewards, dtype=np.float64)
        self._smoothing = smoothing

    def probabilities(self) -> Law:
        """1/K each."""
        return np.full(len(self._mean_reward), 1 / len(self._mean_reward))

    def loss_weights(self, arms: Sequence[int]) -> Law:
        """What the mean loss of each arm is multiplied by, in every step: float64[K]."""
        return np.maximum(self._mean_reward, 0) + _LEAST

    def update(self, rewards: Mapping[int, float]) -> None:
        """Move the averages of the window's arms."""
        for arm, reward in rewards.items():
            self._mean_reward[arm] = smoothed(self._mean_reward[arm], reward, self._smoothing)

    def state_dict(self) -> dict[str, Any]:
        """Smoothed rewards rbar."""
        return {"mean_reward": self._mean_reward.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self._mean_reward = np.array(state["mean_reward"], dtype=np.float64)
