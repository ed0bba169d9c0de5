"""Online Data Mixing (Albalak, Pan, Raffel, Wang 2023, arXiv 2312.02406): loss as reward.

With L_i the training loss of domain i in this step and t the step, after warm-up:

    paper            R_i <- s R_i + (1-s) L_i / pi_{t-1}(i)      pi ~ exp(eps_{t-1} R)
    released         R_i <- s R_i + (1-s) exp(L_i)               pi ~ R
    released_single  R_i <- s R_i + (1-s) exp(L_i)               pi ~ exp(eps_{t-1} R)
    released_exp3    R_i <- R_i + (L_i / 10) / pi_{t-1}(i)       pi ~ exp(eps_{t-1} R)

each normalised and then pi_t = (1 - K eps_t) pi + eps_t, eps_t = min(1/K, sqrt(ln K / (K t))).
`released` is what the 1B runs used. In the paper's form R is a bounded average while eps shrinks,
so pi drifts to uniform.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from stillhouse.mixing.policy import (
    Law,
    Policy,
    exploration_rate,
    explore,
    normalise,
    smoothed,
    softmax,
)

OdmForm: TypeAlias = Literal["paper", "released", "released_single", "released_exp3"]
_EXP3_SCALE = 10


class Odm(Policy):
    """ODM's bandit; `update` takes the mean losses in nats of the step's domains.

    Args:
        initial_weights: the law until warm-up ends: [K], any scale.
        smoothing: s, how much of the old estimate stays.
        warmup_steps: steps that only count.
    """

    def __init__(
        self,
        initial_weights: ArrayLike,
        *,
        form: OdmForm = "paper",
        smoothing: float = 0.9,
        warmup_steps: int = 0,
    ) -> None:
        self._law = normalise(initial_weights)
        self._estimate = np.zeros(len(self._law))
        self._form: OdmForm = form
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
            self._estimate[arm] = self._estimated(arm, loss)
        seen_before = self._step - 1 > self._warmup_steps
        previous = exploration_rate(len(self._law), self._step - 1 if seen_before else 0)
        law = (
            normalise(self._estimate)
            if self._form == "released"
            else softmax(previous * self._estimate)
        )
        self._law = explore(law, exploration_rate(len(self._law), self._step))

    def _estimated(self, arm: int, loss: float) -> float:
        old = float(self._estimate[arm])
        match self._form:
            case "paper":
                return smoothed(old, loss / float(self._law[arm]), 1 - self._smoothing)
            case "released_exp3":
                return old + loss / _EXP3_SCALE / float(self._law[arm])
            case _:
                return smoothed(old, float(np.exp(loss)), 1 - self._smoothing)

    def state_dict(self) -> dict[str, Any]:
        """Estimates R, the law pi, steps."""
        return {
            "estimate": self._estimate.tolist(),
            "law": self._law.tolist(),
            "step": self._step,
        }

    def extended(self, state: dict[str, Any], places: Sequence[int]) -> dict[str, Any]:
        """As of every policy; new arms start at the mean estimate and at their share by size."""
        found = super().extended(state, places)
        for arm in {*range(len(self._law))} - {*places}:
            found["estimate"][arm] = float(np.mean(state["estimate"]))
        return found | {"law": normalise(found["law"]).tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self._estimate = np.array(state["estimate"], dtype=np.float64)
        self._law = np.array(state["law"], dtype=np.float64)
        self._step = state["step"]
