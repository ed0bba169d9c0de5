"""FLAD's bandits as its published code draws from them, to compare the faithful ones with.

Its batch sampler applies a softmax to whatever it is handed, probabilities and one-hot choices
alike, which makes both nearly uniform.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from stillhouse.mixing.exp3 import Exp3, Exp3Settings
from stillhouse.mixing.policy import Law, MixFacts, Policy, invert, softmax
from stillhouse.mixing.ucb1 import Ucb1, Ucb1Settings


class ReleasedExp3Settings(Exp3Settings):
    """EXP3 whose exploration rate falls ten times faster, and whose draws follow softmax(pi)."""

    exploration_speed: float = 10.0

    def make(self, facts: MixFacts) -> "ReleasedExp3":
        """EXP3 before its first window."""
        return ReleasedExp3(
            len(facts.arms), accumulation=facts.accumulation, speed=self.exploration_speed
        )


class ReleasedExp3(Exp3):
    """Draws follow softmax(pi); importance weights stay 1 / pi."""

    def play(self, uniform: float) -> int:
        """The arm that `uniform` falls on under softmax(pi)."""
        return invert(softmax(self.probabilities()), uniform)


class ReleasedUcb1Settings(Ucb1Settings):
    """UCB1 whose draws follow softmax(one-hot of the best arm)."""

    target_batches: int

    def make(self, facts: MixFacts) -> "ReleasedUcb1":
        """UCB1 after the initial pass."""
        shadow = self.target_batches % facts.accumulation
        return ReleasedUcb1(Ucb1(facts.initial_rewards, smoothing=self.smoothing), shadow)


class ReleasedUcb1(Policy):
    """UCB1 as published.

    Args:
        bandit: counts and rewards.
        shadow: added to the rounds at optimiser steps: a loop variable of the published target
            pass shadows the outer one.
    """

    def __init__(self, bandit: Ucb1, shadow: int) -> None:
        self._bandit, self._shadow, self._at_step = bandit, shadow, False

    def indices(self) -> Law:
        """Upper confidence bounds: float64[K]."""
        state = self._bandit.state_dict()
        counts = np.array(state["counts"])
        rounds = counts.sum() + (self._shadow if self._at_step else 0)
        return np.array(state["mean_reward"]) + np.sqrt(2 * np.log(rounds) / counts)

    def probabilities(self) -> Law:
        """Softmax of the best arm's one-hot: float64[K]."""
        indices = self.indices()
        return softmax(np.arange(len(indices)) == np.argmax(indices))

    def play(self, uniform: float) -> int:
        """The arm that `uniform` falls on; its count advances."""
        arm = super().play(uniform)
        self._bandit.count(arm)
        self._at_step = False
        return arm

    def update(self, rewards: Mapping[int, float]) -> None:
        """Move the averages of the window's arms."""
        self._bandit.update(rewards)
        self._at_step = True

    def state_dict(self) -> dict[str, Any]:
        """The bandit's state, and whether a step has just ended."""
        return {**self._bandit.state_dict(), "at_step": self._at_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self._bandit.load_state_dict(state)
        self._at_step = state["at_step"]
