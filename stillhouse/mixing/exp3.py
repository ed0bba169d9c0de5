"""EXP3-FLAD (Albalak, Raffel, Wang 2023, arXiv 2302.00674): an adversarial bandit over arms.

    pi_t(a) = (1 - K eps_t) softmax_a(eps_{t-1} Rhat) + eps_t
    Rhat_a += rbar_a / pi_t(a)      for the arms played in the window, once a window
    eps_t   = min(1/K, sqrt(ln K / (K t))),  t = speed * G * step + 1

G micro-batches make a window (one optimiser step), so G * step micro-batches have been played. The
paper's formula is speed 1; the published code has 10, so it explores sqrt(10) times less.
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field

from stillhouse.mixing.policy import (
    BanditSettings,
    Law,
    MixFacts,
    Policy,
    Positive,
    Smoothing,
    exploration_rate,
    explore,
    smoothed,
    softmax,
)


class Exp3Settings(BanditSettings):
    """EXP3-FLAD: draws by exponential weights with a floor of exploration."""

    name: Literal["exp3"]
    smoothing: Smoothing = Field(
        default=1.0, description="of rewards; 1, as published, keeps only the last"
    )
    exploration_speed: Positive | None = Field(
        default=None,
        description="rounds a micro-batch counts as; default 1, the paper's formula (its code: 10)",
    )
    initial_pass: bool = Field(
        default=False, description="first rewards from a pass over the arms; as published: none"
    )

    @property
    def needs_initial_pass(self) -> bool:
        """Only where the spec asks for it."""
        return self.initial_pass

    def make(self, facts: MixFacts) -> "Exp3":
        """EXP3 before its first window."""
        return Exp3(
            len(facts.arms),
            accumulation=facts.accumulation,
            smoothing=self.smoothing,
            speed=self.exploration_speed or 1,
            initial_rewards=facts.initial_rewards if self.initial_pass else None,
        )


class Exp3(Policy):
    """EXP3 with importance-weighted rewards.

    Args:
        accumulation: G, micro-batches an optimiser step.
        smoothing: beta of the moving average of rewards; 1, as published, keeps only the last.
        speed: rounds that a micro-batch counts as, for the exploration rate.
        initial_rewards: rbar before the first window, by default 1.
    """

    def __init__(
        self,
        num_arms: int,
        *,
        accumulation: int,
        smoothing: float = 1.0,
        speed: float = 1.0,
        initial_rewards: ArrayLike | None = None,
    ) -> None:
        self._accumulation, self._smoothing, self._speed = accumulation, smoothing, speed
        start = np.ones(num_arms) if initial_rewards is None else initial_rewards
        self._mean_reward = np.array(start, dtype=np.float64)
        self._cumulative = np.zeros(num_arms)
        self._step = 0

    def exploration_rate(self, step: int) -> float:
        """eps after `step` optimiser steps."""
        return exploration_rate(
            len(self._cumulative), self._speed * self._accumulation * step + 1 if step > 0 else 0
        )

    def probabilities(self) -> Law:
        """pi: float64[K]."""
        previous = self.exploration_rate(self._step - 1)
        return explore(softmax(previous * self._cumulative), self.exploration_rate(self._step))

    def update(self, rewards: Mapping[int, float]) -> None:
        """Credit the window's arms, each once, by the law in force during the window."""
        law = self.probabilities()
        for arm, reward in rewards.items():
            self._mean_reward[arm] = smoothed(self._mean_reward[arm], reward, self._smoothing)
            self._cumulative[arm] += self._mean_reward[arm] / law[arm]
        self._step += 1

    def state_dict(self) -> dict[str, Any]:
        """Smoothed rewards rbar, cumulative rewards Rhat, optimiser steps."""
        return {
            "mean_reward": self._mean_reward.tolist(),
            "cumulative_reward": self._cumulative.tolist(),
            "step": self._step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self._mean_reward = np.array(state["mean_reward"], dtype=np.float64)
        self._cumulative = np.array(state["cumulative_reward"], dtype=np.float64)
        self._step = state["step"]
