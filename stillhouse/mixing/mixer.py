"""The mixer of one run: a policy with its state, generator and log. One for all workers.

    mixer.begin(initial_rewards)    or    mixer.resume(state)
    draw = mixer.deal()             # the same for every worker
    mixer.learn(rewards)            # of the step, from all workers
    state = mixer.checkpoint()      # the log is in the store when this returns

Its state travels with the training's checkpoint, so a mixer that is lost is made anew from there.
Rewards are quantised to 2^-10 before anything learns them. One that is not finite is not learnt
from; at the eleventh the run stops.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stillhouse.errors import DivergedError, SpecError
from stillhouse.mixing.decisions import (
    Decision,
    chain,
    log_parts,
    quantise,
    read_decisions,
    write_decisions,
)
from stillhouse.mixing.policy import MixFacts
from stillhouse.mixing.task import MixTask
from stillhouse.storage import commit
from stillhouse.storage.filesystem import join, list_names

MAX_BAD_REWARDS = 10


@dataclass(frozen=True, slots=True)
class Draw:
    """A step's arms by slot, and what each arm's loss is multiplied by (None: 1)."""

    arms: list[int]
    weights: list[float] | None = None


class Mixer:
    """Deals arms by the task's policy and keeps a decision for each; called between two steps."""

    def __init__(self, task: MixTask) -> None:
        self._task, self._rule = task, task.rule
        self._arms = [part.name for part in task.arms]

    def begin(self, initial_rewards: Sequence[float]) -> None:
        """Start a run; `initial_rewards` [K], or none where the policy reads none.

        Raises:
            SpecError: weights of arms that are not there. InputError: a log of other arms.
            DivergedError: a first reward is not finite.
        """
        for arm, reward in zip(self._arms, initial_rewards, strict=False):
            if not math.isfinite(reward):
                raise DivergedError(
                    f"the first reward of arm `{arm}` is {reward}: the model's gradients are not "
                    "finite before any step; try `train.dtype: float32` or another model"
                )
        task, rule = self._task, self._rule
        self._initial = [quantise(reward) for reward in initial_rewards]
        sizes = [part.num_rows for part in task.arms]
        facts = MixFacts(self._arms, rule.slots, task.seed, sizes, self._initial)
        self._state = rule.policy.start(facts) if rule.policy.draws_arms else {}
        self._rng = np.random.Generator(np.random.PCG64(task.seed))
        self._step, self._digest, self._num_bad = 0, "", 0
        self._draws = [0] * len(self._arms)
        self._open: list[Decision] = []
        self._decisions: list[Decision] = []

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state.

        Raises:
            SpecError: it is of other arms; names the difference. InputError: its log is gone.
        """
        if state["arms"] != self._arms:
            gone, new = {*state["arms"]} - {*self._arms}, {*self._arms} - {*state["arms"]}
            raise SpecError(
                f"the checkpoint has other arms: gone from the spec: {sorted(gone)}, new: "
                f"{sorted(new)}, or in another order; give `auxiliary` the arms it began with"
            )
        self.begin(state["initial_rewards"])
        for key, value in state["policy"].items():
            fresh = self._state[key]
            kept = np.array(value, fresh.dtype) if isinstance(fresh, np.ndarray) else value
            self._state[key] = kept
        self._rng.bit_generator.state = state["rng"]
        self._step, self._num_bad = state["step"], state["num_bad"]
        self._digest, self._draws = state["digest"], list(state["draws"])
        logs = self._rule.policy.draws_arms and self._step > 0
        if logs and self._part() not in list_names(self._task.log):  # begun by another run
            self._adopt(state["log"])

    def deal(self) -> Draw:
        """Draw the arms of the next step, in the order of its micro-batches."""
        policy, state = self._rule.policy, self._state
        if not policy.draws_arms:
            return Draw([])
        whole = self._step % self._task.log_every == 0
        pi = policy.probabilities(state).tolist() if whole else None
        indices = policy.indices(state) if whole else None
        uniforms = self._rng.random(self._rule.slots).tolist()
        self._open = [
            Decision(self._step, slot, uniform, policy.play(state, uniform))
            for slot, uniform in enumerate(uniforms)
        ]
        listed = None if indices is None else indices.tolist()
        self._open[0] = replace(self._open[0], probabilities=pi, indices=listed)
        arms = [decision.arm for decision in self._open]
        weights = policy.loss_weights(state, arms)
        return Draw(arms, None if weights is None else weights.tolist())

    def learn(self, rewards: Mapping[int, float]) -> list[str]:
        """End the step: the policy learns the rewards. Returns a complaint for each bad one.

        Raises:
            DivergedError: more than `MAX_BAD_REWARDS` were not finite so far.
        """
        bad = sorted(arm for arm, reward in rewards.items() if not math.isfinite(reward))
        good = {arm: quantise(rewards[arm]) for arm in sorted({*rewards} - {*bad})}
        complaints = [
            f"step {self._step}: the reward of arm `{self._arms[arm]}` is {rewards[arm]}"
            for arm in bad
        ]
        self._num_bad += len(bad)
        if self._num_bad > MAX_BAD_REWARDS:
            raise DivergedError(
                f"{complaints[-1]}; {self._num_bad} rewards were not finite: lower `learning_rate`"
            )
        if self._rule.policy.draws_arms:
            self._rule.policy.update(self._state, good)
            played = [decision.arm for decision in self._open]
            for arm, count in Counter(played).items():
                self._draws[arm] += count
            self._digest = chain(self._digest, self._step, played)
        self._decisions += [replace(row, reward=good.get(row.arm)) for row in self._open]
        self._open = []
        self._step += 1
        return complaints

    def checkpoint(self) -> dict[str, Any]:
        """Write the decisions since the last call as a part of the log; the state as JSON values.

        Lists of K values are by arm.
        """
        assert not self._open, "between two steps only"
        self._write(self._decisions)
        self._decisions = []
        kept = {k: v for k, v in self._state.items() if not k.startswith("_")}
        return {
            "step": self._step,
            "arms": self._arms,
            "initial_rewards": self._initial,
            "policy": {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in kept.items()},
            "rng": self._rng.bit_generator.state,
            "digest": self._digest,
            "draws": list(self._draws),
            "num_bad": self._num_bad,
            "log": self._task.log,
        }

    def summary(self) -> dict[str, Any]:
        """`draws` by arm and `decisions_sha256`, the chain over all finished steps."""
        found = {
            "draws": dict(zip(self._arms, self._draws, strict=True)),
            "decisions_sha256": self._digest,
        }
        return found | self._rule.policy.summary(self._state, self._arms)

    def _adopt(self, log: str) -> None:
        """Put what another run logged up to here into this run's log."""
        logged, _ = read_decisions(log_parts(log))
        self._write([decision for decision in logged if decision.step < self._step])

    def _write(self, decisions: Sequence[Decision]) -> None:
        if decisions:
            part = write_decisions(decisions, self._arms, self._task.regime)
            commit.replace(join(self._task.log, self._part()), part)

    def _part(self) -> str:
        """Name of the log's part that ends here."""
        return f"{self._step:08d}.parquet"


def check_arms(arms: Sequence[str]) -> None:
    """At least two arms, each with a name of its own.

    Raises:
        SpecError: otherwise.
    """
    if len(arms) < 2:
        raise SpecError(f"`auxiliary` has {len(arms)} arm(s) {list(arms)}: mixing needs two")
    twice = sorted(name for name, count in Counter(arms).items() if count > 1)
    if twice:
        raise SpecError(f"`auxiliary` has several arms of one name: {twice}; rename them")
