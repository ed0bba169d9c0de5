"""DoReMi (Xie et al. 2023, arXiv 2305.10429): domain weights by group DRO on excess loss.

    lambda_i = mean over domain i's tokens of max(loss_proxy - loss_reference, 0)
    w <- w exp(eta lambda), normalised;  w <- (1 - c) w + c / K
    average = running mean of w, the initial weights being its first term
    loss of a step = sum(u loss) / sum(u) over its micro-batches,  u = w / q of their domains

It takes three trainings: the reference, the proxy (this policy, sampled by the reference weights
q), and the final model, which samples by the average. A domain that has not been in a step keeps
its last lambda, initially 0: the reference code starts at ln(vocabulary), about 10, so that a
domain missing from the first steps takes all the weight.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from stillhouse.data_settings import FROM_SETTING
from stillhouse.mixing.policy import (
    Distribution,
    MixFacts,
    Policy,
    Positive,
    State,
    StepPlan,
    normalise,
    softmax,
)
from stillhouse.mixing.static import by_size
from stillhouse.settings import Share


class DoReMi(Policy):
    """DoReMi: weights by excess loss of a proxy over a reference model."""

    weights_losses: ClassVar[bool] = True

    path: str | None = Field(
        default=None,
        description="the reference model, trained on the reference weights: a folder or URI",
    )
    from_: str | None = Field(default=None, alias="from", description=FROM_SETTING)
    eta: Positive = Field(default=1.0, description="step size; 0.1 for small batches")
    smoothing: Share = Field(default=1e-3, description="share that is spread evenly; as published")
    size_temperature: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="reference weights are sizes ** this; 0: uniform, as published"
    )

    def plan(self, target_batches: int) -> StepPlan:
        return StepPlan(0, "excess")

    def start(self, facts: MixFacts) -> State:
        q = normalise(by_size(facts.sizes, self.size_temperature))
        mean = {"average": q.copy(), "terms": 1}
        return {"_reference": q, "weights": q.copy(), "excess": np.zeros(len(q)), **mean}

    def probabilities(self, state: State) -> Distribution:
        """q: the proxy's domains are drawn by the reference weights, never by w."""
        return state["_reference"].copy()

    def loss_weights(self, state: State, arms: Sequence[int]) -> Distribution:
        """u over its mean in the step, so that the mean of the weighted losses is
        sum(u loss) / sum(u).
        """
        u = state["weights"] / state["_reference"]
        return u / u[list(arms)].mean()

    def update(self, state: State, rewards: Mapping[int, float]) -> None:
        """One step of group DRO on the excess losses lambda of the step's domains."""
        for arm, excess in rewards.items():
            state["excess"][arm] = excess
        raised = softmax(np.log(state["weights"]) + self.eta * state["excess"])
        w = (1 - self.smoothing) * raised + self.smoothing / len(raised)
        state["terms"] += 1
        state["average"] = state["average"] + (w - state["average"]) / state["terms"]
        state["weights"] = w

    def summary(self, state: State, arms: Sequence[str]) -> dict[str, Any]:
        """`average_weights` by arm: what the final model should sample by."""
        return {"average_weights": dict(zip(arms, state["average"].tolist(), strict=True))}

    def identity(self, seed: int | None = None) -> dict[str, Any]:
        """Without the reference model, which is identified by its content."""
        return self.model_dump(mode="json", exclude={"path", "from_"})
