"""FLAD's bandits as its published code draws from them, to compare the faithful ones with.

Its batch sampler applies a softmax to whatever it is handed, probabilities and one-hot choices
alike, which makes both nearly uniform.
"""

from collections.abc import Mapping

import numpy as np

from stillhouse.mixing.flad import Exp3, Ucb1
from stillhouse.mixing.policy import Distribution, MixFacts, State, invert, softmax


class ReleasedExp3(Exp3):
    """EXP3 whose exploration rate falls ten times faster; draws follow softmax(pi), importance
    weights stay 1 / pi.
    """

    exploration_speed: float | None = 10.0

    def play(self, state: State, uniform: float) -> int:
        """The arm that `uniform` falls on under softmax(pi)."""
        return invert(softmax(self.probabilities(state)), uniform)


class ReleasedUcb1(Ucb1):
    """UCB1 whose draws follow softmax(one-hot of the best arm).

    A loop variable of the published target pass shadows the outer one, so that the rounds at
    optimiser steps are too many by its last value.
    """

    target_batches: int

    def start(self, facts: MixFacts) -> State:
        """UCB1 after the initial pass; whether a step has just ended."""
        shadow = self.target_batches % facts.accumulation
        return super().start(facts) | {"_shadow": shadow, "at_step": False}

    def indices(self, state: State) -> Distribution:
        """Upper confidence bounds: float64[K]."""
        rounds = state["counts"].sum() + (state["_shadow"] if state["at_step"] else 0)
        return state["mean_reward"] + np.sqrt(2 * np.log(rounds) / state["counts"])

    def probabilities(self, state: State) -> Distribution:
        """Softmax of the best arm's one-hot: float64[K]."""
        indices = self.indices(state)
        return softmax(np.arange(len(indices)) == np.argmax(indices))

    def play(self, state: State, uniform: float) -> int:
        """The arm that `uniform` falls on; its count advances."""
        arm = invert(self.probabilities(state), uniform)
        state["counts"][arm] += 1
        state["at_step"] = False
        return arm

    def update(self, state: State, rewards: Mapping[int, float]) -> None:
        """Move the averages of the window's arms."""
        super().update(state, rewards)
        state["at_step"] = True
