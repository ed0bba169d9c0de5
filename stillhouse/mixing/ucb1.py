"""UCB1-FLAD (Albalak, Raffel, Wang 2023, arXiv 2302.00674): play the highest upper bound.

    index_a = rbar_a + sqrt(2 ln(rounds) / n_a),   rounds = micro-batches so far + K

An initial pass over all arms gives rbar and counts as one play of each. Counts advance with each
micro-batch, rbar only at optimiser steps, as a moving average because rewards drift.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from stillhouse.mixing.policy import Law, Policy, Sampler, sampling_law, smoothed


class Ucb1(Policy):
    """UCB1 with smoothed rewards.

    Args:
        initial_rewards: rbar from the initial pass: [K].
        smoothing: beta of the moving average, 0.1 as published.
        sampler: `released` draws from softmax(one-hot of the best arm), and counts rounds as the
            released code does: at optimiser steps it adds `target_batches mod accumulation`, as a
            loop variable of its target pass shadows the outer one.
        accumulation, target_batches: micro-batches of arms and of the target a step; only read by
            the released sampler.
    """

    def __init__(
        self,
        initial_rewards: ArrayLike,
        *,
        smoothing: float = 0.1,
        sampler: Sampler = "faithful",
        accumulation: int = 1,
        target_batches: int = 0,
    ) -> None:
        self._mean_reward = np.array(initial_rewards, dtype=np.float64)
        self._counts = np.ones(len(self._mean_reward), dtype=np.int64)
        self._smoothing = smoothing
        self._sampler: Sampler = sampler
        self._shadow = target_batches % accumulation if sampler == "released" else 0
        self._at_step = False

    def indices(self) -> Law:
        """Upper confidence bound of each arm: float64[K]."""
        rounds = int(self._counts.sum()) + (self._shadow if self._at_step else 0)
        return self._mean_reward + np.sqrt(2 * np.log(rounds) / self._counts)

    def probabilities(self) -> Law:
        """One-hot of the first best arm, or its softmax with the released sampler."""
        choice = np.zeros(len(self._counts))
        choice[np.argmax(self.indices())] = 1
        return sampling_law(choice, self._sampler)

    def play(self, uniform: float) -> int:
        """The best arm; only the released sampler looks at `uniform`. The arm's count advances."""
        arm = super().play(uniform)
        self.count(arm)
        return arm

    def count(self, arm: int) -> None:
        """Note a micro-batch of `arm`; `play` does it itself."""
        self._counts[arm] += 1
        self._at_step = False

    def update(self, rewards: Mapping[int, float]) -> None:
        """Move the averages of the window's arms."""
        for arm, reward in rewards.items():
            self._mean_reward[arm] = smoothed(self._mean_reward[arm], reward, self._smoothing)
        self._at_step = True

    def state_dict(self) -> dict[str, Any]:
        """Smoothed rewards rbar, counts n, and whether a step has just ended."""
        return {
            "mean_reward": self._mean_reward.tolist(),
            "counts": self._counts.tolist(),
            "at_step": self._at_step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self._mean_reward = np.array(state["mean_reward"], dtype=np.float64)
        self._counts = np.array(state["counts"], dtype=np.int64)
        self._at_step = state["at_step"]
