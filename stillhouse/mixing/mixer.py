"""The mixer of one run: its policy, its generator and its log. One process has it for all workers.

    mixer.begin(initial_rewards)    or    mixer.resume(state)
    draw = mixer.deal()             # the same for every worker
    mixer.learn(rewards)            # of the step, from all workers
    state = mixer.checkpoint()      # the log is in the store when this returns

Its state travels with the training's checkpoint, so a mixer that is lost is made anew from there.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from stillhouse.errors import DivergedError
from stillhouse.mixing.decision_log import log_parts
from stillhouse.mixing.decisions import (
    quantise,
    read_decisions,
    write_decisions,
)
from stillhouse.mixing.doremi import DoReMi
from stillhouse.mixing.policy import MixFacts, PolicySettings
from stillhouse.mixing.schedule import DrawSchedule
from stillhouse.storage.commit import replace
from stillhouse.storage.filesystem import join, list_names


@dataclass(frozen=True, slots=True)
class MixerTask:
    """What a mixer is made of. Small plain values.

    Attributes:
        arms, sizes: names and rows of the arms.
        slots: auxiliary micro-batches a step.
        log: URI of the folder of its decisions.
        log_every: steps between two that log the whole law.
        regime: what a replay has to know beside the draws.
    """

    settings: PolicySettings
    arms: tuple[str, ...]
    sizes: tuple[int, ...]
    slots: int
    seed: int
    log: str
    log_every: int = 10
    regime: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Draw:
    """A step's arms by slot, and what each arm's loss is multiplied by (None: 1)."""

    arms: list[int]
    weights: list[float] | None = None


class MixerHandle(Protocol):
    """A mixer, here or in another process."""

    def begin(self, initial_rewards: Sequence[float]) -> None:
        """Start a run."""
        ...

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state."""
        ...

    def deal(self) -> Draw:
        """The next step's draws."""
        ...

    def learn(self, rewards: Mapping[int, float]) -> list[str]:
        """End the step; complaints about rewards that were not finite."""
        ...

    def checkpoint(self) -> dict[str, Any]:
        """Write the log so far; the state."""
        ...

    def summary(self) -> dict[str, Any]:
        """`draws` by arm and `decisions_sha256` of all finished steps."""
        ...


class Mixer:
    """A `MixerHandle` in this process."""

    def __init__(self, task: MixerTask) -> None:
        self._task = task
        self._initial: list[float] = []
        self._schedule: DrawSchedule | None = None
        self._step = 0

    def begin(self, initial_rewards: Sequence[float]) -> None:
        """Start a run; `initial_rewards` [K], or none where the policy reads none.

        Raises:
            SpecError: weights of arms that are not there. InputError: a log of other arms.
            DivergedError: a first reward is not finite.
        """
        task = self._task
        for arm, reward in zip(task.arms, initial_rewards, strict=False):
            if not math.isfinite(reward):
                raise DivergedError(
                    f"the first reward of arm `{arm}` is {reward}: the model's gradients are not "
                    "finite before any step; try `train.dtype: float32` or another model"
                )
        self._initial, self._step = [quantise(reward) for reward in initial_rewards], 0
        if not task.settings.draws_arms:
            return
        facts = MixFacts(
            arms=task.arms,
            accumulation=task.slots,
            seed=task.seed,
            sizes=task.sizes,
            initial_rewards=self._initial,
        )
        self._schedule = DrawSchedule(
            task.settings.make(facts),
            task.arms,
            accumulation=task.slots,
            seed=task.seed,
            log_every=task.log_every,
        )

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state.

        Raises:
            SpecError: it is of other arms. InputError: its log is gone.
        """
        self.begin(state["initial_rewards"])
        self._step = state["step"]
        if self._schedule is not None:
            self._schedule.load_state_dict(state["schedule"])
            if self._part() not in list_names(self._task.log):  # begun under another spec's run
                self._adopt(state)

    def _adopt(self, state: dict[str, Any]) -> None:
        """Put what another run logged up to here into this run's log."""
        logged, arms = read_decisions(log_parts(state["log"]))
        found = [decision for decision in logged if decision.step < self._step]
        part = write_decisions(found, arms, self._task.regime)
        replace(join(self._task.log, self._part()), part)

    def _part(self) -> str:
        """Name of the log's part that ends here."""
        return f"{self._step:08d}.parquet"

    def deal(self) -> Draw:
        """The next step's draws."""
        if self._schedule is None:
            return Draw([])
        arms = self._schedule.deal()
        weights = self._schedule.policy.loss_weights(arms)
        return Draw(arms, None if weights is None else weights.tolist())

    def learn(self, rewards: Mapping[int, float]) -> list[str]:
        """End the step.

        Raises:
            DivergedError: too many rewards were not finite.
        """
        self._step += 1
        return [] if self._schedule is None else self._schedule.learn(rewards)

    def checkpoint(self) -> dict[str, Any]:
        """Write the decisions since the last call as a part of the log; the state."""
        schedule = None
        if self._schedule is not None:
            decisions = self._schedule.take_decisions()
            if decisions:
                part = write_decisions(decisions, self._task.arms, self._task.regime)
                replace(join(self._task.log, self._part()), part)
            schedule = self._schedule.state_dict()
        return {
            "step": self._step,
            "initial_rewards": self._initial,
            "schedule": schedule,
            "log": self._task.log,
        }

    def summary(self) -> dict[str, Any]:
        """What was drawn, and the chain over all decisions."""
        if self._schedule is None:
            return {"draws": dict.fromkeys(self._task.arms, 0), "decisions_sha256": ""}
        found = {
            "draws": self._schedule.draws,
            "decisions_sha256": self._schedule.decisions_sha256,
        }
        policy = self._schedule.policy
        if isinstance(policy, DoReMi):
            weights = zip(self._task.arms, policy.average.tolist(), strict=True)
            found["average_weights"] = dict(weights)
        return found
