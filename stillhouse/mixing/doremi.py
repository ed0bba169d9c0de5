"""DoReMi (Xie et al. 2023, arXiv 2305.10429): domain weights by group DRO on excess loss.

    lambda_i = mean over domain i's tokens of max(loss_proxy - loss_reference, 0)
    w <- w exp(eta lambda), normalised;  w <- (1 - c) w + c / K
    average = running mean of w, the initial weights being its first term
    loss of a step = sum(u loss) / sum(u) over its micro-batches,  u = w / q of their domains

Three trainings: the reference, the proxy (this policy, sampled by the reference weights q), and the
final model, which samples by the average. The reference code averages over tokens, of which its
micro-batches hold equally many.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field

from stillhouse.mixing.plan import StepPlan
from stillhouse.mixing.policy import (
    Law,
    MixFacts,
    Policy,
    PolicySettings,
    Positive,
    normalise,
    softmax,
)
from stillhouse.mixing.static import by_size
from stillhouse.settings import Share


class DoReMiSettings(PolicySettings):
    """DoReMi: weights by excess loss of a proxy over a reference model."""

    name: Literal["doremi"]
    path: str | None = Field(
        default=None,
        description="the reference model, trained on the reference weights: a folder or URI",
    )
    eta: Positive = Field(default=1.0, description="step size; 0.1 for small batches")
    smoothing: Share = Field(default=1e-3, description="share spread evenly; as published")
    size_temperature: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="reference weights are sizes ** this; 0: uniform, as published"
    )

    weights_losses: ClassVar[bool] = True

    def plan(self, target_batches: int) -> StepPlan:
        """No pass over the target; rewards are excess losses."""
        return StepPlan(0, "excess")

    def make(self, facts: MixFacts) -> "DoReMi":
        """The proxy's weights at the reference weights."""
        reference = by_size(facts.sizes, self.size_temperature)
        return DoReMi(reference, eta=self.eta, smoothing=self.smoothing)

    def identity(self) -> dict[str, Any]:
        """Without the reference model, which is named by its content."""
        return self.model_dump(mode="json", exclude={"path"})


class DoReMi(Policy):
    """The proxy's domain weights; `update` takes the excess losses lambda of the step's domains.

    A domain that the step does not hold keeps its last lambda. The reference code starts it at
    ln(vocabulary), about 10, so that a domain missing from the first steps takes all the weight;
    the default of 0 leaves it where it is.

    Args:
        reference_weights: q, what the proxy samples by and w starts from: [K], any scale.
        eta: step size.
        smoothing: c, the share spread evenly.
        initial_excess: lambda before a domain is first seen.
    """

    def __init__(
        self,
        reference_weights: ArrayLike,
        *,
        eta: float = 1.0,
        smoothing: float = 1e-3,
        initial_excess: float = 0.0,
    ) -> None:
        self._reference = normalise(reference_weights)
        self.weights = self._reference.copy()
        self.average = self._reference.copy()
        self.excess = np.full(len(self.weights), initial_excess, dtype=np.float64)
        self._eta, self._smoothing, self._terms = eta, smoothing, 1

    def probabilities(self) -> Law:
        """q: the proxy's domains are drawn by the reference weights, never by w."""
        return self._reference.copy()

    def loss_weights(self, arms: Sequence[int]) -> Law:
        """u = w / q over its mean in the step's micro-batches, whose mean loss is then
        sum(u loss) / sum(u): float64[K].
        """
        u = self.weights / self._reference
        return u / u[list(arms)].mean()

    def update(self, rewards: Mapping[int, float]) -> None:
        """One step of group DRO."""
        for arm, excess in rewards.items():
            self.excess[arm] = excess
        raised = softmax(np.log(self.weights) + self._eta * self.excess)
        self.weights = (1 - self._smoothing) * raised + self._smoothing / len(raised)
        self._terms += 1
        self.average = self.average + (self.weights - self.average) / self._terms

    def state_dict(self) -> dict[str, Any]:
        """w, its running mean, the last lambda of each domain, terms of the mean."""
        return {
            "weights": self.weights.tolist(),
            "average": self.average.tolist(),
            "excess": self.excess.tolist(),
            "terms": self._terms,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.weights = np.array(state["weights"], dtype=np.float64)
        self.average = np.array(state["average"], dtype=np.float64)
        self.excess = np.array(state["excess"], dtype=np.float64)
        self._terms = state["terms"]
