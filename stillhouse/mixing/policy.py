"""Mixing policies: a distribution over K arms that learns from rewards once a step.

A policy is one class in one file. Its fields are its settings, the keys under `policy` in a spec.
What changes while it decides is a state, which the caller keeps, saves and hands in again:

    state = policy.start(facts)                  # arrays [K] and plain values, by name
    arm = policy.play(state, uniform)            # once for each micro-batch
    policy.update(state, {arm: reward})          # once a step, with the arms that were played

A draw consumes exactly one uniform number, which a log can keep. The distribution may change with
each play (UCB1) or at updates alone (the others). A spec names a policy by a name of `POLICIES`,
or a class of the user's own, which is the same thing, by `package.module:Class`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError, model_validator

from stillhouse.own_code import code_digest, import_named
from stillhouse.settings import Count, Settings, without_removed

_HERE = "stillhouse.mixing"
POLICIES = {
    "exp3": f"{_HERE}.exp3:Exp3",
    "ucb1": f"{_HERE}.ucb1:Ucb1",
    "odm": f"{_HERE}.odm:Odm",
    "doremi": f"{_HERE}.doremi:DoReMi",
    "static": f"{_HERE}.static:Static",
    "uniform": f"{_HERE}.static:Uniform",
    "target_only": f"{_HERE}.static:TargetOnly",
    "loss_scaling": f"{_HERE}.loss_scaling:LossScaling",
    "replay": f"{_HERE}.replay:Replay",
}

Distribution: TypeAlias = NDArray[np.float64]
State: TypeAlias = dict[str, Any]
"""Of a policy: float64 or int64 arrays and plain values. A key that begins with `_` is not saved:
`start` makes it anew."""
RewardName: TypeAlias = Literal["alignment", "magnitude", "aggregate"]
RewardKind: TypeAlias = RewardName | Literal["loss", "excess"]
Positive = Annotated[float, Field(gt=0)]
Smoothing = Annotated[float, Field(gt=0.0, le=1.0)]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """How the steps of a run are made up.

    Attributes:
        target_batches: micro-batches of the target in each update; 0 for none.
        reward: what arms are rewarded for; None where nothing is learnt. `excess` is DoReMi's.
        target_gradient: of which weights; only for rewards by gradients.
        parameters: whose gradients are compared.
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
        """Gradient passes of a step with so many auxiliary micro-batches."""
        again = self.by_gradient and self.target_gradient == "after_step"
        return slots + self.target_batches * (2 if again else 1)


@dataclass(frozen=True, slots=True)
class MixFacts:
    """What a policy may know of the run when it starts.

    Attributes:
        arms: names of the K arms.
        accumulation: auxiliary micro-batches a step.
        sizes: examples of each arm.
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
    """Whether its steps hold micro-batches of arms."""
    weights_losses: ClassVar[bool] = False
    """Whether its losses are weighted, so that its draws alone do not repeat a run."""

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
        """The distribution that the next draw follows: float64[K], sums to 1."""

    def update(self, state: State, rewards: Mapping[int, float]) -> None:
        """Learn the rewards of the arms that were played since the last update."""

    def play(self, state: State, uniform: float) -> int:
        """The arm that a uniform number in [0, 1) falls on."""
        return invert(self.probabilities(state), uniform)

    def loss_weights(self, state: State, arms: Sequence[int]) -> Distribution | None:
        """What each arm's loss is multiplied by in a step of these micro-batches, which are
        averaged then: float64[K]; None for 1.
        """
        return None

    def indices(self, state: State) -> Distribution | None:
        """What the next arm is the maximum of, float64[K]; None for policies that draw."""
        return None

    def summary(self, state: State, arms: Sequence[str]) -> dict[str, Any]:
        """What the model's manifest says of a finished run, as JSON values."""
        return {}

    def plan(self, target_batches: int) -> StepPlan:
        """What a step holds beside the drawn micro-batches, and what arms are rewarded for.

        Args:
            target_batches: micro-batches of one pass over the target's training half.
        """
        return StepPlan(0)

    @property
    def label(self) -> str:
        """The name as it stands in results: of the user's own, that of the class."""
        return self.name.rpartition(":")[2]

    @property
    def first_examples(self) -> int:
        """Rows of each arm that its initial reward is measured on; 0: `start` reads none."""
        return 0

    def check(self, accumulation: int, micro_batch: int) -> None:
        """Refuse a run that the policy cannot decide for; before anything is read or trained.

        Raises:
            SpecError, InputError: what is wrong.
        """

    def identity(self, seed: int | None = None) -> dict[str, Any]:
        """Everything here that decides the result of a seed, or of all: JSON values.

        The code of a class of the user's own is part of it.
        """
        code = None if self.name in POLICIES else code_digest(self.name)
        return self.model_dump(mode="json") | ({} if code is None else {"code": code})


class RewardPolicy(Policy):
    """Rewards by how alike the gradients of an arm and of the target are (FLAD)."""

    reward: RewardName = Field(
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

    @model_validator(mode="before")
    @classmethod
    def _no_sampler(cls, content: Any) -> Any:
        return without_removed(content, "sampler", ("faithful",), "draws follow the paper")

    @property
    def first_examples(self) -> int:
        """The initial pass gives the first rewards."""
        return self.initial_examples

    def plan(self, target_batches: int) -> StepPlan:
        """The target's pass, and rewards by its gradient."""
        return StepPlan(target_batches, self.reward, self.target_gradient, self.parameters)


def find_policy(given: Any) -> Any:
    """The section `policy` of a spec as settings of the class that its `name` names.

    Raises:
        ValueError: no such policy, or a key that it does not have.
    """
    if not isinstance(given, dict) or not isinstance(given.get("name"), str):
        return given
    found = import_named(given["name"], POLICIES)
    if not (isinstance(found, type) and issubclass(found, Policy)):
        raise ValueError(f"`{given['name']}` is not a subclass of stillhouse.mixing.policy.Policy")
    try:
        return found.model_validate(given)
    except ValidationError as error:
        unknown = [d["loc"][0] for d in error.errors() if d["type"] == "extra_forbidden"]
        if not unknown:
            raise
        known = ", ".join(found.model_fields)
        raise ValueError(f"`{given['name']}` has no key `{unknown[0]}`; it has {known}") from None


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
    """The share that every arm keeps: eps_t = min(1/K, sqrt(ln K / (K t))); 1/K at t = 0."""
    if rounds <= 0:
        return 1 / num_arms
    return min(1 / num_arms, float(np.sqrt(np.log(num_arms) / (num_arms * rounds))))


def explore(distribution: Distribution, rate: float) -> Distribution:
    """(1 - K eps) distribution + eps: no arm falls below `rate`."""
    return (1 - len(distribution) * rate) * distribution + rate


def smooth(means: Distribution, rewards: Mapping[int, float], smoothing: float) -> None:
    """FLAD's moving average of some arms, in place: mean <- (1 - beta) mean + beta reward.

    beta = 1 keeps only the last reward.
    """
    for arm, reward in rewards.items():
        means[arm] = (1 - smoothing) * means[arm] + smoothing * reward
