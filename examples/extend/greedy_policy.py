"""A mixing policy that is not ours: draws in proportion to each arm's last reward.

In a spec, run in this folder (or with it on PYTHONPATH):

    policy: {name: "greedy_policy:Greedy", floor: 0.05}

Any subclass of `Policy` is one: its fields are the keys, its state is saved and logged for it.
`RewardPolicy` brings FLAD's rewards by gradients, a `Policy` says in `plan` what it learns from.
"""

from collections.abc import Mapping

import numpy as np
from pydantic import Field

from stillhouse.mixing.flad import RewardPolicy
from stillhouse.mixing.policy import Distribution, MixFacts, State, normalise


class Greedy(RewardPolicy):
    """Draws in proportion to the last reward of each arm."""

    floor: float = Field(default=0.01, gt=0, description="least weight of an arm")

    def start(self, facts: MixFacts) -> State:
        """The rewards of the initial pass."""
        return {"rewards": np.array(facts.initial_rewards)}

    def probabilities(self, state: State) -> Distribution:
        """Rewards as weights: float64[K]."""
        return normalise(np.maximum(state["rewards"], self.floor))

    def update(self, state: State, rewards: Mapping[int, float]) -> None:
        """Keep the last reward of each arm."""
        for arm, reward in rewards.items():
            state["rewards"][arm] = reward
