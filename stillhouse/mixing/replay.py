"""A run's decisions once more: the same arms in the same order, whatever the rewards are."""

from typing import Any

import numpy as np
from pydantic import Field

from stillhouse.errors import InputError, SpecError
from stillhouse.fingerprint import sha256
from stillhouse.mixing.decisions import log_parts, logs_of, read_decisions, read_regime
from stillhouse.mixing.policy import Distribution, MixFacts, Policy, State, StepPlan


class Replay(Policy):
    """The decisions of an earlier run once more."""

    log: str = Field(description="a run (URI), or the folder of one seed's decisions")

    def plan(self, target_batches: int) -> StepPlan:
        """Steps as those of the run that was logged."""
        return StepPlan(self._regime()["target_batches"])

    def _regime(self) -> dict[str, Any]:
        """What all logs of a run have in common."""
        return read_regime(next(iter(logs_of(self.log).values())))

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

    def start(self, facts: MixFacts) -> State:
        """The log of the run's seed, at its start.

        Raises:
            SpecError: it is of another seed. InputError: it is gone, or of other arms.
        """
        logs = logs_of(self.log)
        if facts.seed not in logs:
            seeds = ", ".join(map(str, logs))
            raise SpecError(f"`policy.log` is of seed {seeds}: set `seeds: [{seeds}]` to replay it")
        decisions, logged = read_decisions(log_parts(logs[facts.seed]))
        if logged != list(facts.arms):
            different = sorted({*logged} ^ {*facts.arms}) or "only in their order"
            raise InputError(
                f"the arms of the log and of `auxiliary` differ: {different}; replay with the arms "
                "of the run that wrote it"
            )
        arms = [decision.arm for decision in decisions]
        return {"_arms": arms, "_num_arms": len(logged), "place": 0}

    def probabilities(self, state: State) -> Distribution:
        """One-hot of the next logged arm."""
        choice = np.zeros(state["_num_arms"])
        choice[_next(state)] = 1
        return choice

    def play(self, state: State, uniform: float) -> int:
        """The next logged arm; `uniform` is not looked at.

        Raises:
            InputError: the log is at its end.
        """
        arm = _next(state)
        state["place"] += 1
        return arm

    def identity(self, seed: int | None = None) -> dict[str, Any]:
        """The content of the logs, wherever they lie: of one seed, or of all."""
        logs = logs_of(self.log)
        wanted = [logs[seed]] if seed in logs else list(logs.values())
        return {"name": self.name, "log_sha256": [sha256(b"".join(log_parts(w))) for w in wanted]}


def _next(state: State) -> int:
    if state["place"] >= len(state["_arms"]):
        raise InputError(
            f"the log of decisions ends after {state['place']:,} micro-batches: lower "
            "`train.num_steps` to what it holds"
        )
    return state["_arms"][state["place"]]
