"""The mixer of one run: a policy with its state, generator and log. One for all workers.

    mixer.begin(initial_rewards)    or    mixer.resume(state)
    draw = mixer.draw()             # the same for every worker
    mixer.learn(rewards)            # of the step, from all workers
    state = mixer.checkpoint()      # the log is in the store when this returns

Its state is saved with the training's checkpoint, so a lost mixer is recreated from there. Rewards
are rounded to 2^-10 before anything learns from them. Rewards that are not finite are ignored; at
the eleventh the run stops.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stillhouse.errors import DivergedError
from stillhouse.mixing.decisions import (
    Decision,
    chain,
    log_parts,
    read_decisions,
    write_decisions,
)
from stillhouse.mixing.policy import MixFacts
from stillhouse.mixing.spec import MixTask
from stillhouse.storage import commit
from stillhouse.storage.filesystem import join, list_names

MAX_BAD_REWARDS = 10
_QUANTUM = 2.0**-10


@dataclass(frozen=True, slots=True)
class Draw:
    """A step's arms by slot, and the factor of each arm's loss (None: 1)."""

    arms: list[int]
    weights: list[float] | None = None


class Mixer:
    """Draws arms by the task's policy and logs each decision; called between two steps."""

    def __init__(self, task: MixTask) -> None:
        self._task, self._policy = task, task.rule.policy
        self._arms = [part.name for part in task.arms]

    def begin(self, initial_rewards: Sequence[float]) -> None:
        """Start a run; `initial_rewards` [K], empty where the policy needs none.

        Raises:
            SpecError: weights of unknown arms. InputError: a log of other arms.
            DivergedError: an initial reward is not finite.
        """
        for arm, reward in zip(self._arms, initial_rewards, strict=False):
            if not math.isfinite(reward):
                raise DivergedError(
                    f"the first reward of arm `{arm}` is {reward}: the model's gradients are not "
                    "finite before any step; try `train.dtype: float32` or another model"
                )
        task, policy = self._task, self._policy
        self._initial = [quantise(reward) for reward in initial_rewards]
        sizes = [part.num_rows for part in task.arms]
        facts = MixFacts(self._arms, task.rule.slots, task.seed, sizes, self._initial)
        self._state = policy.start(facts) if policy.draws_arms else {}
        self._rng = np.random.Generator(np.random.PCG64(task.seed))
        self._step, self._digest, self._num_bad = 0, "", 0
        self._draws = [0] * len(self._arms)
        self._open: list[Decision] = []
        self._decisions: list[Decision] = []

    def resume(self, state: dict[str, Any]) -> None:
        """Restore what `checkpoint` returned.

        Raises:
            InputError: its log is gone.
        """
        self.begin(state["initial_rewards"])
        for key, value in state["policy"].items():
            fresh = self._state[key]
            is_array = isinstance(fresh, np.ndarray)
            self._state[key] = np.array(value, fresh.dtype) if is_array else value
        self._rng.bit_generator.state = state["rng"]
        self._step, self._num_bad = state["step"], state["num_bad"]
        self._digest, self._draws = state["digest"], list(state["draws"])
        if not self._policy.draws_arms or self._step == 0:
            return
        if self._part() not in list_names(self._task.log):  # another run's log: copy it so far
            logged, _ = read_decisions(log_parts(state["log"]))
            self._write([decision for decision in logged if decision.step < self._step])

    def draw(self) -> Draw:
        """Draw the arms of the next step, in the order of its micro-batches."""
        policy, state = self._policy, self._state
        if not policy.draws_arms:
            return Draw([])
        pi = indices = None
        if self._step % self._task.log_every == 0:
            pi, indices = policy.probabilities(state).tolist(), policy.indices(state)
        uniforms = self._rng.random(self._task.rule.slots).tolist()
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
        good = {
            arm: quantise(rewards[arm]) for arm in sorted(rewards) if math.isfinite(rewards[arm])
        }
        complaints = [
            f"step {self._step}: the reward of arm `{self._arms[arm]}` is {rewards[arm]}"
            for arm in sorted({*rewards} - {*good})
        ]
        self._num_bad += len(complaints)
        if self._num_bad > MAX_BAD_REWARDS:
            raise DivergedError(
                f"{complaints[-1]}; {self._num_bad} rewards were not finite: lower `learning_rate`"
            )
        if self._policy.draws_arms:
            self._policy.update(self._state, good)
            played = [decision.arm for decision in self._open]
            for arm in played:
                self._draws[arm] += 1
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
        saved = {k: v for k, v in self._state.items() if not k.startswith("_")}
        return {
            "step": self._step,
            "initial_rewards": self._initial,
            "policy": {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in saved.items()},
            "rng": self._rng.bit_generator.state,
            "digest": self._digest,
            "draws": list(self._draws),
            "num_bad": self._num_bad,
            "log": self._task.log,
        }

    def summary(self) -> dict[str, Any]:
        """`draws` by arm, `decisions_sha256`, the chain over all steps, and the policy's own."""
        return {
            "draws": dict(zip(self._arms, self._draws, strict=True)),
            "decisions_sha256": self._digest,
            **self._policy.summary(self._state, self._arms),
        }

    def _write(self, decisions: Sequence[Decision]) -> None:
        if decisions:
            part = write_decisions(decisions, self._arms, self._task.regime)
            commit.replace(join(self._task.log, self._part()), part)

    def _part(self) -> str:
        """Name of the log's part that ends at this step."""
        return f"{self._step:08d}.parquet"


def quantise(reward: float) -> float:
    """The nearest multiple of 2^-10 (halves to even), so that summation order rarely matters."""
    return float(np.rint(reward / _QUANTUM) * _QUANTUM)
