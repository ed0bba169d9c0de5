"""Online Data Mixing (Albalak, Pan, Raffel, Wang 2023, arXiv 2312.02406): loss as reward.

With L_i the training loss of domain i in this step and t the step, after warm-up:

    R_i <- s R_i + (1-s) L_i / pi_{t-1}(i)
    pi_t = (1 - K eps_t) softmax(eps_{t-1} R) + eps_t,   eps_t = min(1/K, sqrt(ln K / (K t)))

R is a bounded average while eps shrinks, so pi drifts to uniform.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from pydantic import Field, model_validator

from stillhouse.mixing.policy import (
    Distribution,
    MixFacts,
    Policy,
    State,
    StepPlan,
    exploration_rate,
    explore,
    normalise,
    smooth,
    softmax,
)
from stillhouse.settings import Share, without_removed


class Odm(Policy):
    """Online Data Mixing: the reward is the arm's training loss; needs no target."""

    smoothing: Share = Field(default=0.9, description="weight of the old estimate in the average")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(
        default=0, description="steps that draw by the arms' sizes; published: 2,000"
    )

    @model_validator(mode="before")
    @classmethod
    def _no_form(cls, content: Any) -> Any:
        return without_removed(content, "form", ("paper",), "only the paper's formula is left")

    def plan(self, target_batches: int) -> StepPlan:
        return StepPlan(0, "loss")

    def start(self, facts: MixFacts) -> State:
        """R = 0, and pi in proportion to the arms' sizes until warm-up ends."""
        pi = normalise(facts.sizes)
        return {"estimate": np.zeros(len(pi)), "distribution": pi, "step": 0}

    def probabilities(self, state: State) -> Distribution:
        return state["distribution"].copy()

    def update(self, state: State, rewards: Mapping[int, float]) -> None:
        """Learn the mean losses of the domains that were in the step."""
        state["step"] += 1
        step, num_arms = state["step"], len(state["estimate"])
        if step <= self.warmup_steps:
            return
        pi = state["distribution"]
        credited = {arm: loss / float(pi[arm]) for arm, loss in rewards.items()}
        smooth(state["estimate"], credited, 1 - self.smoothing)
        previous = exploration_rate(num_arms, step - 1 if step - 1 > self.warmup_steps else 0)
        weights = softmax(previous * state["estimate"])
        state["distribution"] = explore(weights, exploration_rate(num_arms, step))
