"""Online Data Mixing (Albalak, Pan, Raffel, Wang 2023, arXiv 2312.02406): loss as reward.

With L_i the training loss of domain i in this step and t the step, after warm-up:

    R_i <- s R_i + (1-s) L_i / pi_{t-1}(i)
    pi_t = (1 - K eps_t) softmax(eps_{t-1} R) + eps_t,   eps_t = min(1/K, sqrt(ln K / (K t)))

R is a bounded average while eps shrinks, so pi drifts to uniform.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field, model_validator

from stillhouse.mixing.plan import StepPlan
from stillhouse.mixing.policy import (
    Law,
    MixFacts,
    Policy,
    PolicySettings,
    exploration_rate,
    explore,
    normalise,
    smoothed,
    softmax,
)
from stillhouse.settings import Share, without_removed


class OdmSettings(PolicySettings):
    """Online Data Mixing: the reward is the arm's training loss, no target is needed."""

    name: Literal["odm"]
    smoothing: Share = Field(default=0.9, description="how much of the old estimate stays")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(
        default=0, description="steps at the arms' sizes before learning; published: 2,000"
    )

    @model_validator(mode="before")
    @classmethod
    def _no_form(cls, content: Any) -> Any:
        return without_removed(content, "form", ("paper",), "the paper's formula is what there is")

    def plan(self, target_batches: int) -> StepPlan:
        """No pass over the target; rewards are losses."""
        return StepPlan(0, "loss")

    def make(self, facts: MixFacts) -> "Odm":
        """ODM at the arms' sizes."""
        return Odm(facts.sizes, smoothing=self.smoothing, warmup_steps=self.warmup_steps)


class Odm(Policy):
    """ODM's bandit; `update` takes the mean losses in nats of the step's domains.

    Args:
        initial_weights: the law until warm-up ends: [K], any scale.
        smoothing: s, how much of the old estimate stays.
        warmup_steps: steps that only count.
    """

    def __init__(
        self, initial_weights: ArrayLike, *, smoothing: float = 0.9, warmup_steps: int = 0
    ) -> None:
        self._law = normalise(initial_weights)
        self._estimate = np.zeros(len(self._law))
        self._smoothing, self._warmup_steps, self._step = smoothing, warmup_steps, 0

    def probabilities(self) -> Law:
        """pi: float64[K]."""
        return self._law.copy()

    def update(self, rewards: Mapping[int, float]) -> None:
        """Learn the losses of the domains that the step held."""
        self._step += 1
        if self._step <= self._warmup_steps:
            return
        for arm, loss in rewards.items():
            credited = loss / float(self._law[arm])
            self._estimate[arm] = smoothed(self._estimate[arm], credited, 1 - self._smoothing)
        seen_before = self._step - 1 > self._warmup_steps
        previous = exploration_rate(len(self._law), self._step - 1 if seen_before else 0)
        self._law = explore(
            softmax(previous * self._estimate), exploration_rate(len(self._law), self._step)
        )

    def state_dict(self) -> dict[str, Any]:
        """Estimates R, the law pi, steps."""
        return {
            "estimate": self._estimate.tolist(),
            "law": self._law.tolist(),
            "step": self._step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self._estimate = np.array(state["estimate"], dtype=np.float64)
        self._law = np.array(state["law"], dtype=np.float64)
        self._step = state["step"]
