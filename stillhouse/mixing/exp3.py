"""EXP3-FLAD (Albalak, Raffel, Wang 2023, arXiv 2302.00674): an adversarial bandit over arms.

    pi_t(a) = (1 - K eps_t) softmax_a(eps_{t-1} Rhat) + eps_t
    Rhat_a += rbar_a / pi_t(a)      for the arms played in the window, once a window
    eps_t   = min(1/K, sqrt(ln K / (K t))),  t = speed * G * step + 1

G micro-batches make a window (one optimiser step), so G * step micro-batches have been played. The
paper's formula is speed 1; the published code has 10, so it explores sqrt(10) times less.
"""

from collections.abc import Mapping

import numpy as np
from pydantic import Field

from stillhouse.mixing.policy import (
    Distribution,
    MixFacts,
    Positive,
    RewardPolicy,
    Smoothing,
    State,
    exploration_rate,
    explore,
    smooth,
    softmax,
)


class Exp3(RewardPolicy):
    """EXP3-FLAD: draws by exponential weights with a floor of exploration."""

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
    def first_examples(self) -> int:
        """Only where the spec asks for an initial pass."""
        return self.initial_examples if self.initial_pass else 0

    def start(self, facts: MixFacts) -> State:
        """rbar of the initial pass, or 1; Rhat 0; G; optimiser steps."""
        rewards = facts.initial_rewards if self.initial_pass else np.ones(len(facts.arms))
        return {
            "mean_reward": np.array(rewards, dtype=np.float64),
            "cumulative_reward": np.zeros(len(facts.arms)),
            "step": 0,
            "_accumulation": facts.accumulation,
        }

    def exploration_rate(self, state: State, step: int) -> float:
        """eps after `step` optimiser steps."""
        speed = self.exploration_speed or 1
        rounds = speed * state["_accumulation"] * step + 1 if step > 0 else 0
        return exploration_rate(len(state["mean_reward"]), rounds)

    def probabilities(self, state: State) -> Distribution:
        """pi: float64[K]."""
        step = state["step"]
        previous = self.exploration_rate(state, step - 1)
        weights = softmax(previous * state["cumulative_reward"])
        return explore(weights, self.exploration_rate(state, step))

    def update(self, state: State, rewards: Mapping[int, float]) -> None:
        """Credit the window's arms, each once, by the distribution in force during the window."""
        played = self.probabilities(state)
        smooth(state["mean_reward"], rewards, self.smoothing)
        for arm in rewards:
            state["cumulative_reward"][arm] += state["mean_reward"][arm] / played[arm]
        state["step"] += 1
