"""Mixing policies: distributions over K arms that learn from rewards once a step.

A policy is one class in one file; its fields are its settings, the keys under `policy` in a spec.
What changes during a run is its state, which the caller keeps, saves and passes in:

    state = policy.start(facts)                  # arrays [K] and plain values, by name
    arm = policy.play(state, uniform)            # once for each micro-batch
    policy.update(state, {arm: reward})          # once a step, with the arms that were played

A draw consumes exactly one uniform number, which the log keeps. The distribution may change with
each play (UCB1) or only at updates (the others). A spec names a policy by a name in `POLICIES` or,
for a class of the user's own, as `package.module:Class`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError

from stillhouse.custom_code import find_named, import_named
from stillhouse.settings import Settings

_HERE = "stillhouse.mixing"
POLICIES = {
    "exp3": f"{_HERE}.flad:Exp3",
    "ucb1": f"{_HERE}.flad:Ucb1",
    "odm": f"{_HERE}.odm:Odm",
    "doremi": f"{_HERE}.doremi:DoReMi",
    "static": f"{_HERE}.static:Static",
    "uniform": f"{_HERE}.static:Uniform",
    "target_only": f"{_HERE}.static:TargetOnly",
    "loss_scaling": f"{_HERE}.flad:LossScaling",
    "replay": f"{_HERE}.decisions:Replay",
}

Distribution: TypeAlias = NDArray[np.float64]
State: TypeAlias = dict[str, Any]
"""A policy's float64 or int64 arrays and plain values. Keys that begin with `_` are not saved:
`start` recomputes them."""
RewardName: TypeAlias = Literal["alignment", "magnitude", "aggregate"]
RewardKind: TypeAlias = RewardName | Literal["loss", "excess"]
Positive = Annotated[float, Field(gt=0)]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What a training step consists of.

    Attributes:
        target_batches: micro-batches of the target in each update; 0 for none.
        reward: what arms are rewarded for; None where nothing is learned. `excess` is DoReMi's.
        target_gradient: the weights that the target's gradient is taken at.
        parameters: the parameters whose gradients are compared.
    """

    target_batches: int
    reward: RewardKind | None = None
    target_gradient: Literal["before_step", "after_step"] = "before_step"
    parameters: str = "output_head"

    @property
    def by_gradient(self) -> bool:
        """Whether rewards compare gradients."""
        return self.reward in ("alignment", "magnitude", "aggregate")

    def passes(self, slots: int) -> int:
        """Gradient passes of a step with `slots` auxiliary micro-batches."""
        second_pass = self.by_gradient and self.target_gradient == "after_step"
        return slots + self.target_batches * (2 if second_pass else 1)


@dataclass(frozen=True, slots=True)
class MixFacts:
    """What a policy may know about the run when it starts.

    Attributes:
        arms: names of the K arms.
        accumulation: auxiliary micro-batches a step.
        sizes: examples in each arm.
        initial_rewards: measured by the initial pass, [K]; empty where there is none.
    """

    arms: Sequence[str]
    accumulation: int
    seed: int = 0
    sizes: Sequence[int] = ()
    initial_rewards: Sequence[float] = ()


class Policy(Settings, ABC):
    """Decides which arm the next micro-batch comes from."""

    draws_arms: ClassVar[bool] = True
    """Whether its steps contain micro-batches of arms."""
    weights_losses: ClassVar[bool] = False
    """Whether it weights losses, so that replaying its draws does not reproduce a run."""

    name: str = Field(
        description=f"one of {', '.join(POLICIES)}, or `package.module:Class` of your own"
    )

    @abstractmethod
    def start(self, facts: MixFacts) -> State:
        """The state before the first step.

        Raises:
            SpecError, InputError: the settings do not fit the run.
        """

    @abstractmethod
    def probabilities(self, state: State) -> Distribution:
        """The distribution of the next draw: float64[K], sums to 1."""

    def update(self, state: State, rewards: Mapping[int, float]) -> None:
        """Learn the rewards of the arms that were played since the last update."""

    def play(self, state: State, uniform: float) -> int:
        """The arm that a uniform number in [0, 1) selects."""
        return invert(self.probabilities(state), uniform)

    def loss_weights(self, state: State, arms: Sequence[int]) -> Distribution | None:
        """Factor of each arm's loss in a step of these micro-batches, before their losses are
        averaged: float64[K]; None for 1.
        """
        return None

    def indices(self, state: State) -> Distribution | None:
        """The values whose maximum is played next, float64[K]; None for policies that draw."""
        return None

    def summary(self, state: State, arms: Sequence[str]) -> dict[str, Any]:
        """What the model's manifest records of a finished run, as JSON values."""
        return {}

    def plan(self, target_batches: int) -> StepPlan:
        """What a step contains beside the drawn micro-batches, and what arms are rewarded for.

        Args:
            target_batches: micro-batches of one pass over the target's training half.
        """
        return StepPlan(0)

    @property
    def label(self) -> str:
        """Its name in results; for a user's own policy, the class name."""
        return self.name.rpartition(":")[2]

    @property
    def first_examples(self) -> int:
        """Rows of each arm that its initial reward is measured on; 0 where `start` needs none."""
        return 0

    def check(self, accumulation: int, micro_batch: int) -> None:
        """Refuse a run that the policy cannot decide for, before anything is read or trained.

        Raises:
            SpecError, InputError: the reason.
        """

    def identity(self, seed: int | None = None) -> dict[str, Any]:
        """Everything that determines the result for one seed, or for all: JSON values.

        Includes the code of a class of the user's own.
        """
        code = None if self.name in POLICIES else find_named("policy.name", self.name)
        return self.model_dump(mode="json") | ({} if code is None else {"code": code.digest})


def find_policy(content: Any) -> Any:
    """The section `policy` of a spec as settings of the class that its `name` names.

    Raises:
        ValueError: no such policy, or an unknown key.
    """
    if not isinstance(content, dict) or not isinstance(content.get("name"), str):
        return content
    cls = import_named(content["name"], POLICIES)
    if not (isinstance(cls, type) and issubclass(cls, Policy)):
        raise ValueError(f"`{content['name']}` is not a subclass of {Policy.__module__}.Policy")
    try:
        return cls.model_validate(content)
    except ValidationError as error:
        unknown = [d["loc"][0] for d in error.errors() if d["type"] == "extra_forbidden"]
        if not unknown:
            raise
        keys = ", ".join(cls.model_fields)
        raise ValueError(f"`{content['name']}` has no key `{unknown[0]}`; it has {keys}") from None


NamedPolicy: TypeAlias = Annotated[SerializeAsAny[Policy], BeforeValidator(find_policy)]


def invert(probabilities: Distribution, uniform: float) -> int:
    """The first arm at which the cumulative distribution exceeds `uniform`; never one of mass 0."""
    cumulative = np.cumsum(probabilities)
    return int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))


def softmax(values: ArrayLike) -> Distribution:
    """Softmax in float64, stable for any finite values: [K] -> float64[K]."""
    logits = np.asarray(values, dtype=np.float64)
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def normalise(weights: ArrayLike) -> Distribution:
    """Non-negative weights as a distribution: [K] -> float64[K]."""
    values = np.asarray(weights, dtype=np.float64)
    return values / values.sum()


def exploration_rate(num_arms: int, rounds: float) -> float:
    """Lower bound of every arm's probability: min(1/K, sqrt(ln K / (K t))); 1/K at t = 0."""
    if rounds <= 0:
        return 1 / num_arms
    return min(1 / num_arms, float(np.sqrt(np.log(num_arms) / (num_arms * rounds))))


def explore(distribution: Distribution, rate: float) -> Distribution:
    """(1 - K eps) distribution + eps: no arm falls below `rate`."""
    return (1 - len(distribution) * rate) * distribution + rate


def smooth(means: Distribution, rewards: Mapping[int, float], smoothing: float) -> None:
    """Exponential moving average of some arms' rewards, in place; 1 keeps only the last."""
    for arm, reward in rewards.items():
        means[arm] = (1 - smoothing) * means[arm] + smoothing * reward
