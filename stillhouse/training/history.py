"""What a training went through, kept in its checkpoints: curves, evaluations, time."""

from copy import deepcopy
from dataclasses import asdict
from typing import Any

from stillhouse.training.evaluate import SourceLoss
from stillhouse.training.loop import StepRecord

_POINTS = 500


class History:
    """Means over runs of steps (500 of them in a training at most), evaluations, and sums of time.

    Only what is computed is equal for equal trainings; seconds are as measured.

    Args:
        num_steps: of the training.
    """

    def __init__(self, num_steps: int) -> None:
        self._every = -(-num_steps // _POINTS)
        self._num_steps = num_steps
        self._run: list[StepRecord] = []
        self._state: dict[str, Any] = {
            "points": [],
            "evaluations": [],
            "loss": None,
            "seconds": 0.0,
            "data_wait_s": 0.0,
            "mfu_s": None,
        }

    def add(self, record: StepRecord) -> dict[str, float] | None:
        """Take a step; the point that it completes, if it does."""
        state = self._state
        state["seconds"] += record.seconds
        state["data_wait_s"] += record.data_wait_s
        state["loss"] = record.loss
        if record.mfu is not None:
            state["mfu_s"] = (state["mfu_s"] or 0.0) + record.mfu * record.seconds
        self._run.append(record)
        if record.step % self._every and record.step != self._num_steps:
            return None
        point = self._point()
        state["points"].append(point)
        self._run = []
        return point

    def evaluated(
        self,
        record: StepRecord,
        nll: float,
        heldout: dict[str, SourceLoss],
        trained: dict[str, SourceLoss],
    ) -> dict[str, Any]:
        """Take an evaluation after a step, with the training losses by source since the last."""
        found = {
            "step": record.step,
            "tokens": record.tokens,
            "nll": nll,
            "heldout": {name: asdict(loss) for name, loss in heldout.items()},
            "trained": {name: asdict(loss) for name, loss in trained.items()},
        }
        self._state["evaluations"].append(found)
        return found

    def _point(self) -> dict[str, float]:
        run = self._run
        seconds = sum(r.seconds for r in run)
        first = run[0].tokens - run[0].tokens_per_s * run[0].seconds
        return {
            "step": run[-1].step,
            "tokens": run[-1].tokens,
            "loss": sum(r.loss for r in run) / len(run),
            "grad_norm": max(r.grad_norm for r in run),
            "learning_rate": run[-1].learning_rate,
            "tokens_per_s": (run[-1].tokens - first) / seconds,
            "data_wait_share": sum(r.data_wait_s for r in run) / seconds,
        }

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything, with the steps of the point that is not complete yet."""
        return {**deepcopy(self._state), "run": [asdict(record) for record in self._run]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._run = [StepRecord(**record) for record in state["run"]]
        self._state = {key: deepcopy(value) for key, value in state.items() if key != "run"}
