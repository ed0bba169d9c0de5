"""A run's decisions once more: the same arms in the same order, whatever the rewards are."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stillhouse.errors import InputError
from stillhouse.mixing.decisions import Decision
from stillhouse.mixing.policy import Law, Policy


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
