"""What every mixing policy is: a law over K arms that learns from rewards once a step.

One optimiser step: `play` once for each micro-batch, then `update` with the rewards of the arms
that were played. A draw consumes exactly one uniform number, which a log can keep. The law may
change with each play (UCB1) or only at updates (the others). State is plain JSON values, exact.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Law: TypeAlias = NDArray[np.float64]
Sampler: TypeAlias = Literal["faithful", "released"]


class Policy(ABC):
    """Decides which arm the next micro-batch comes from."""

    @abstractmethod
    def probabilities(self) -> Law:
        """The law that the next draw follows: float64[K], sums to 1."""

    @abstractmethod
    def update(self, rewards: Mapping[int, float]) -> None:
        """Learn the rewards of the arms that were played since the last update."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything that changes, as plain JSON values; lists of K values are per arm."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of a policy with the same settings and arms."""

    def extended(self, state: dict[str, Any], places: Sequence[int]) -> dict[str, Any]:
        """A state of fewer arms as one of this fresh policy's arms, which the new ones keep.

        Args:
            state: of a policy with the same settings.
            places: where its arms are here.
        """
        found = self.state_dict()
        for key, value in state.items():
            if isinstance(value, list):
                for place, of_arm in zip(places, value, strict=True):  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
                    found[key][place] = of_arm
            else:
                found[key] = value
        return found

    def play(self, uniform: float) -> int:
        """The arm that a uniform number in [0, 1) falls on."""
        return invert(self.probabilities(), uniform)

    def draw(self, rng: np.random.Generator) -> int:
        """Play with the generator's next uniform number."""
        return self.play(float(rng.random()))

    def loss_weights(self, arms: Sequence[int]) -> Law | None:
        """What each arm's loss is multiplied by in a step of these micro-batches, which are
        averaged then: float64[K]; None for 1.
        """
        return None

    def indices(self) -> Law | None:
        """What the next arm is the maximum of, float64[K]; None for policies that draw."""
        return None


def invert(probabilities: Law, uniform: float) -> int:
    """The first arm at which the cumulative law exceeds `uniform`; never an arm of mass 0."""
    cumulative = np.cumsum(probabilities)
    return int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))


def softmax(values: ArrayLike) -> Law:
    """Softmax in float64, stable for any finite values: [K] -> float64[K]."""
    logits = np.asarray(values, dtype=np.float64)
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def normalise(weights: ArrayLike) -> Law:
    """Non-negative weights as a law: [K] -> float64[K]."""
    values = np.asarray(weights, dtype=np.float64)
    return values / values.sum()


def sampling_law(weights: Law, sampler: Sampler) -> Law:
    """The law that draws follow when a policy hands `weights` to the sampler.

    FLAD's released batch sampler applies a softmax to whatever it is handed, probabilities and
    one-hot choices alike, which makes both nearly uniform; `faithful` draws from the weights.
    """
    return softmax(weights) if sampler == "released" else weights


def exploration_rate(num_arms: int, rounds: float) -> float:
    """The share that every arm keeps: eps_t = min(1/K, sqrt(ln K / (K t))); 1/K at t = 0."""
    if rounds <= 0:
        return 1 / num_arms
    return min(1 / num_arms, float(np.sqrt(np.log(num_arms) / (num_arms * rounds))))


def explore(law: Law, rate: float) -> Law:
    """(1 - K eps) law + eps: no arm falls below `rate`."""
    return (1 - len(law) * rate) * law + rate


def smoothed(mean: float, reward: float, smoothing: float) -> float:
    """FLAD's moving average: (1 - beta) mean + beta reward; beta = 1 keeps only the last."""
    return (1 - smoothing) * mean + smoothing * reward
