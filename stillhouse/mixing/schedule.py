"""The schedule of draws: a policy, its generator and its log, one optimiser step at a time.

    arms = schedule.deal()          # the arms of this step's micro-batches
    schedule.learn({arm: reward})   # after the step, from all workers

Rewards are quantised to 2^-10 before anything learns them. A reward that is not finite is not
learnt from; after `max_bad_rewards` of them the run stops.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from stillhouse.errors import DivergedError, SpecError
from stillhouse.mixing.decisions import Decision, chain, quantise
from stillhouse.mixing.policy import Policy


class DrawSchedule:
    """Deals arms by `policy` and keeps a decision for each.

    Its state is between two steps, never between `deal` and `learn`, and does not hold the
    decisions: take them with `take_decisions` and write them before the state is committed.

    Args:
        arms: names of the K arms.
        accumulation: G, micro-batches a step.
        seed: of the generator.
        log_every: steps between two that log the whole law.
        max_bad_rewards: so many rewards that are not finite are passed over.

    Raises:
        SpecError: fewer than two arms, or two with one name.
    """

    def __init__(
        self,
        policy: Policy,
        arms: Sequence[str],
        *,
        accumulation: int,
        seed: int,
        log_every: int = 10,
        max_bad_rewards: int = 10,
    ) -> None:
        check_arms(arms)
        self.policy, self.arms = policy, list(arms)
        self._accumulation, self._log_every = accumulation, log_every
        self._max_bad, self._num_bad = max_bad_rewards, 0
        self._rng = np.random.Generator(np.random.PCG64(seed))
        self._step, self._digest = 0, ""
        self._draws = [0] * len(arms)
        self._open: list[Decision] = []
        self._decisions: list[Decision] = []

    @property
    def decisions_sha256(self) -> str:
        """`decisions.chain` over all finished steps."""
        return self._digest

    @property
    def draws(self) -> dict[str, int]:
        """Micro-batches of each arm in all finished steps."""
        return dict(zip(self.arms, self._draws, strict=True))

    def deal(self) -> list[int]:
        """Draw the arms of the next step: G of them, in the order of its micro-batches."""
        logged = self._step % self._log_every == 0
        law = self.policy.probabilities().tolist() if logged else None
        indices = self.policy.indices() if logged else None
        listed = None if indices is None else indices.tolist()
        uniforms = self._rng.random(self._accumulation).tolist()
        self._open = [
            Decision(self._step, slot, uniform, self.policy.play(uniform))
            for slot, uniform in enumerate(uniforms)
        ]
        self._open[0] = replace(self._open[0], probabilities=law, indices=listed)
        return [decision.arm for decision in self._open]

    def learn(self, rewards: Mapping[int, float]) -> list[str]:
        """End the step: the policy learns the rewards. Returns a complaint for each bad one.

        Raises:
            DivergedError: more than `max_bad_rewards` were not finite so far.
        """
        bad = sorted(arm for arm, reward in rewards.items() if not math.isfinite(reward))
        good = {arm: quantise(rewards[arm]) for arm in sorted({*rewards} - {*bad})}
        complaints = [
            f"step {self._step}: the reward of arm `{self.arms[arm]}` is {rewards[arm]}"
            for arm in bad
        ]
        self._num_bad += len(bad)
        if self._num_bad > self._max_bad:
            raise DivergedError(
                f"{complaints[-1]}; {self._num_bad} rewards were not finite: lower `learning_rate`"
            )
        self.policy.update(good)
        self._decisions += [replace(row, reward=good.get(row.arm)) for row in self._open]
        played = [row.arm for row in self._open]
        for arm, count in Counter(played).items():
            self._draws[arm] += count
        self._digest = chain(self._digest, self._step, played)
        self._open = []
        self._step += 1
        return complaints

    def take_decisions(self) -> list[Decision]:
        """The decisions of finished steps since the last call."""
        taken, self._decisions = self._decisions, []
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Policy, generator, arms, counts: plain JSON values."""
        assert not self._open, "between two steps only"
        return {
            "arms": self.arms,
            "policy": self.policy.state_dict(),
            "rng": self._rng.bit_generator.state,
            "step": self._step,
            "digest": self._digest,
            "draws": list(self._draws),
            "num_bad": self._num_bad,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of a schedule with the same arms.

        Raises:
            SpecError: the arms differ; names the difference.
        """
        if state["arms"] != self.arms:
            gone, new = {*state["arms"]} - {*self.arms}, {*self.arms} - {*state["arms"]}
            raise SpecError(
                f"the checkpoint has other arms: gone from the spec: {sorted(gone)}, new: "
                f"{sorted(new)}, or in another order; give `auxiliary` the arms it began with"
            )
        self.policy.load_state_dict(state["policy"])
        self._rng.bit_generator.state = state["rng"]
        self._step, self._num_bad = state["step"], state["num_bad"]
        self._digest, self._draws = state["digest"], list(state["draws"])


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
