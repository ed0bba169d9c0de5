"""A run's decisions once more: the same arms in the same order, whatever the rewards are."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field

from stillhouse.errors import InputError, SpecError
from stillhouse.mixing.decision_log import log_digest, log_parts, logs_of, read_log_regime
from stillhouse.mixing.decisions import Decision, read_decisions
from stillhouse.mixing.plan import StepPlan
from stillhouse.mixing.policy import Law, MixFacts, Policy, PolicySettings


class ReplaySettings(PolicySettings):
    """The decisions of an earlier run once more."""

    name: Literal["replay"]
    log: str = Field(description="a run (URI), or the folder of one seed's decisions")

    def plan(self, target_batches: int) -> StepPlan:
        """Steps as those of the run that was logged."""
        return StepPlan(self._regime()["target_batches"])

    def _regime(self) -> dict[str, Any]:
        """What all logs of a run have in common."""
        return read_log_regime(next(iter(logs_of(self.log).values())))

    def check(self, accumulation: int, micro_batch: int) -> None:
        """The log is there, of steps like these, and of a policy that its draws alone repeat."""
        regime = self._regime()
        if regime["weighted"]:
            raise SpecError(f"`policy.log` is of `{regime['policy']}`, whose losses are weighted")
        for key, name, here in (
            ("slots", "accumulation", accumulation),
            ("micro_batch", "micro_batch", micro_batch),
        ):
            if regime[key] != here:
                raise SpecError(
                    f"`policy.log` was written with `train.{name}: {regime[key]}`, not {here}"
                )

    def make(self, facts: MixFacts) -> "Replay":
        """The log from its start.

        Raises:
            SpecError: it is of another seed. InputError: it is gone, or of other arms.
        """
        logs = logs_of(self.log)
        if facts.seed not in logs:
            seeds = ", ".join(map(str, logs))
            raise SpecError(f"`policy.log` is of seed {seeds}: set `seeds: [{seeds}]` to replay it")
        return Replay(*read_decisions(log_parts(logs[facts.seed])), facts.arms)

    def identity(self) -> dict[str, Any]:
        """The content of the logs, wherever they lie."""
        digests = [log_digest(log) for log in logs_of(self.log).values()]
        return {"name": self.name, "log_sha256": digests}


class Replay(Policy):
    """Plays a log of decisions, ordered by step and slot.

    Raises:
        InputError: the log's arms are not the run's; from `play`, the log is at its end.
    """

    def __init__(
        self, decisions: Sequence[Decision], logged_arms: Sequence[str], arms: Sequence[str]
    ) -> None:
        if list(logged_arms) != list(arms):
            different = sorted({*logged_arms} ^ {*arms}) or "only in their order"
            raise InputError(
                f"the arms of the log and of `auxiliary` differ: {different}; replay with the arms "
                "of the run that wrote it"
            )
        self._arms = [decision.arm for decision in decisions]
        self._num_arms, self._place = len(arms), 0

    def probabilities(self) -> Law:
        """One-hot of the next logged arm."""
        law = np.zeros(self._num_arms)
        law[self._next()] = 1
        return law

    def play(self, uniform: float) -> int:
        """The next logged arm; `uniform` is not looked at."""
        arm = self._next()
        self._place += 1
        return arm

    def update(self, rewards: Mapping[int, float]) -> None:
        """Nothing is learnt."""

    def state_dict(self) -> dict[str, Any]:
        """How many decisions have been played."""
        return {"place": self._place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a place."""
        self._place = state["place"]

    def _next(self) -> int:
        if self._place >= len(self._arms):
            raise InputError(
                f"the log of decisions ends after {self._place:,} micro-batches: lower "
                "`train.num_steps` to what it holds"
            )
        return self._arms[self._place]
