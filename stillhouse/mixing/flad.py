"""FLAD (Albalak, Raffel, Wang 2023, arXiv 2302.00674): two bandits rewarded by gradients.

EXP3-FLAD draws by exponential weights. G micro-batches make a window (one optimiser step):

    pi_t(a) = (1 - K eps_t) softmax_a(eps_{t-1} Rhat) + eps_t
    Rhat_a += rbar_a / pi_t(a)      for the arms played in the window, once a window
    eps_t   = min(1/K, sqrt(ln K / (K t))),  t = speed * G * step + 1

UCB1-FLAD plays the highest upper confidence bound; counts n advance with each micro-batch:

    index_a = rbar_a + sqrt(2 ln(rounds) / n_a),   rounds = micro-batches so far + K

Loss scaling, a baseline of the paper, draws uniformly and spends the rewards on losses:

    loss = (max(rbar_a, 0) + 1e-6) * mean token loss

rbar is a moving average of an arm's rewards, updated once a step. The maximum is ours: as
published, a negative cosine makes a negative loss, which unlearns the arm.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from stillhouse.mixing.policy import (
    Distribution,
    MixFacts,
    Policy,
    Positive,
    RewardName,
    State,
    StepPlan,
    exploration_rate,
    explore,
    smooth,
    softmax,
)
from stillhouse.settings import Count, without_removed

Smoothing = Annotated[float, Field(gt=0.0, le=1.0)]
_MIN_LOSS_WEIGHT = 1e-6


class RewardPolicy(Policy):
    """Rewards arms by how similar their gradients are to the target's."""

    reward: RewardName = Field(
        default="alignment", description="alignment: the cosine, as published; ignores scale"
    )
    parameters: str = Field(
        default="output_head",
        description="whose gradients are compared: output_head, as published, or a part of names",
    )
    target_gradient: Literal["before_step", "after_step"] = Field(
        default="before_step",
        description="weights at which it is taken: before_step costs no second pass, after_step is "
        "as published",
    )
    initial_examples: Count = Field(
        default=1000, description="rows of each arm for the first rewards, as published"
    )

    @model_validator(mode="before")
    @classmethod
    def _no_sampler(cls, content: Any) -> Any:
        return without_removed(content, "sampler", ("faithful",), "draws follow the paper")

    @property
    def first_examples(self) -> int:
        return self.initial_examples

    def plan(self, target_batches: int) -> StepPlan:
        return StepPlan(target_batches, self.reward, self.target_gradient, self.parameters)


class Exp3(RewardPolicy):
    """EXP3-FLAD: draws by exponential weights with a floor of exploration."""

    smoothing: Smoothing = Field(
        default=1.0,
        description="weight of a new reward in the average; 1, as published: the last alone",
    )
    exploration_speed: Positive | None = Field(
        default=None,
        description="rounds that a micro-batch counts as; default 1 (the published code: 10)",
    )
    initial_pass: bool = Field(
        default=False, description="measure first rewards by a pass over the arms; published: no"
    )

    @property
    def first_examples(self) -> int:
        return self.initial_examples if self.initial_pass else 0

    def start(self, facts: MixFacts) -> State:
        """rbar of the initial pass, or 1; Rhat 0."""
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
        step = state["step"]
        previous = self.exploration_rate(state, step - 1)
        weights = softmax(previous * state["cumulative_reward"])
        return explore(weights, self.exploration_rate(state, step))

    def update(self, state: State, rewards: Mapping[int, float]) -> None:
        """Credit each arm of the window once, by the distribution it was drawn from."""
        played = self.probabilities(state)
        smooth(state["mean_reward"], rewards, self.smoothing)
        for arm in rewards:
            state["cumulative_reward"][arm] += state["mean_reward"][arm] / played[arm]
        state["step"] += 1


class Ucb1(RewardPolicy):
    """UCB1-FLAD: plays the arm with the highest upper confidence bound."""

    smoothing: Smoothing = Field(
        default=0.1, description="weight of a new reward in the moving average; as published"
    )

    def start(self, facts: MixFacts) -> State:
        """rbar of the initial pass, which counts as one play of each arm."""
        rewards = np.array(facts.initial_rewards, dtype=np.float64)
        return {"mean_reward": rewards, "counts": np.ones(len(rewards), dtype=np.int64)}

    def indices(self, state: State) -> Distribution:
        counts = state["counts"]
        return state["mean_reward"] + np.sqrt(2 * np.log(counts.sum()) / counts)

    def probabilities(self, state: State) -> Distribution:
        """One-hot of the first best arm."""
        choice = np.zeros(len(state["counts"]))
        choice[np.argmax(self.indices(state))] = 1
        return choice

    def play(self, state: State, uniform: float) -> int:
        """The best arm, whatever `uniform` is; advances its count."""
        arm = int(np.argmax(self.indices(state)))
        state["counts"][arm] += 1
        return arm

    def update(self, state: State, rewards: Mapping[int, float]) -> None:
        smooth(state["mean_reward"], rewards, self.smoothing)


class LossScaling(RewardPolicy):
    """Uniform draws; each arm's loss is multiplied by its smoothed reward."""

    weights_losses: ClassVar[bool] = True

    smoothing: Smoothing = Field(default=0.1, description="weight of a new reward in the average")

    def start(self, facts: MixFacts) -> State:
        return {"mean_reward": np.array(facts.initial_rewards, dtype=np.float64)}

    def probabilities(self, state: State) -> Distribution:
        return np.full(len(state["mean_reward"]), 1 / len(state["mean_reward"]))

    def loss_weights(self, state: State, arms: Sequence[int]) -> Distribution:
        return np.maximum(state["mean_reward"], 0) + _MIN_LOSS_WEIGHT

    def update(self, state: State, rewards: Mapping[int, float]) -> None:
        smooth(state["mean_reward"], rewards, self.smoothing)
