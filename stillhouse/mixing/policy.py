"""What every mixing policy is: a law over K arms that learns from rewards once a step.

One optimiser step: `play` once for each micro-batch, then `update` with the rewards of the arms
that were played. A draw consumes exactly one uniform number, which a log can keep. The law may
change with each play (UCB1) or only at updates (the others). State is plain JSON values, exact.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, model_validator

from stillhouse.mixing.plan import StepPlan
from stillhouse.settings import Count, Settings, without_removed

Law: TypeAlias = NDArray[np.float64]
Positive = Annotated[float, Field(gt=0)]
Smoothing = Annotated[float, Field(gt=0.0, le=1.0)]


@dataclass(frozen=True, slots=True)
class MixFacts:
    """What a policy may know of the run when it is made.

    Attributes:
        arms: names of the K arms.
        accumulation: auxiliary micro-batches a step.
        seed: of the run.
        sizes: examples of each arm.
        initial_rewards: measured by the initial pass, [K]; empty where there is none.
    """

    arms: Sequence[str]
    accumulation: int
    seed: int = 0
    sizes: Sequence[int] = ()
    initial_rewards: Sequence[float] = ()


class PolicySettings(Settings, ABC):
    """What a spec says under `policy`; each policy has its own beside its code."""

    draws_arms: ClassVar[bool] = True
    """Whether its steps hold micro-batches of arms."""
    weights_losses: ClassVar[bool] = False
    """Whether its losses are weighted, so that its draws alone do not repeat a run."""

    @abstractmethod
    def make(self, facts: MixFacts) -> "Policy":
        """The policy at the start of a run.

        Raises:
            SpecError, InputError: the settings do not fit the run.
        """

    def plan(self, target_batches: int) -> StepPlan:
        """What a step holds beside the drawn micro-batches, and what arms are rewarded for.

        Args:
            target_batches: micro-batches of one pass over the target's training half.
        """
        return StepPlan(0)

    @property
    def needs_initial_pass(self) -> bool:
        """Whether `make` reads `initial_rewards`."""
        return False

    def check(self, accumulation: int, micro_batch: int) -> None:
        """Refuse a run that the policy cannot decide for; before anything is read or trained.

        Raises:
            SpecError, InputError: what is wrong.
        """

    def identity(self) -> dict[str, Any]:
        """Everything here that decides the result: JSON values."""
        return self.model_dump(mode="json")


class RewardSettings(PolicySettings):
    """Rewards by how alike the gradients of an arm and of the target are (FLAD)."""

    reward: Literal["alignment", "magnitude", "aggregate"] = Field(
        default="alignment", description="alignment: the cosine, as published; sees no scale"
    )
    parameters: str = Field(
        default="output_head",
        description="gradients compared: output_head, as published, or a part of parameters' names",
    )
    target_gradient: Literal["before_step", "after_step"] = Field(
        default="before_step",
        description="before_step: same weights as the arms' and no second pass; after_step: as "
        "published",
    )
    initial_examples: Count = Field(
        default=1000, description="of each arm for the first rewards, as published"
    )

    def plan(self, target_batches: int) -> StepPlan:
        """The target's pass, and rewards by its gradient."""
        return StepPlan(target_batches, self.reward, self.target_gradient, self.parameters)


class BanditSettings(RewardSettings):
    """What EXP3 and UCB1 share."""

    @model_validator(mode="before")
    @classmethod
    def _no_sampler(cls, content: Any) -> Any:
        return without_removed(content, "sampler", ("faithful",), "draws follow the paper")


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
