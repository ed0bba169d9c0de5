"""What trainings of every kind do: from the newest checkpoint to the commit, with their curves."""

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from typing import Any, Protocol

from stillhouse.storage import numbered
from stillhouse.storage.artifact import Store
from stillhouse.training.checkpoint import Checkpoints, Snapshot, fit
from stillhouse.training.group import WorkerGroup
from stillhouse.training.loop import StepRecord, Trainer
from stillhouse.training.optimisation import late_fall
from stillhouse.training.spec import StreamedTraining
from stillhouse.training.task import CHECKPOINTS, Tell

_TELL_S = 1.0
_MAX_POINTS = 500

Evaluate = Callable[[StepRecord], tuple[dict[str, Any], float | None]]
"""Measures after a step, on all workers together: JSON values with `nll`, and the held-out loss
that chooses the best checkpoint, if there is one.
"""


class TrainingTask(Protocol):
    """What is asked of a training's task here."""

    @property
    def checkpoints(self) -> str:
        """Name of its checkpoints."""
        ...

    @property
    def settings(self) -> StreamedTraining: ...

    @property
    def num_steps(self) -> int: ...


def complete(
    store: Store,
    task: TrainingTask,
    trainer: Trainer,
    history: "History",
    tell: Tell,
    group: WorkerGroup,
    commit: Callable[[Snapshot], None],
) -> None:
    """Train to the last step, from the newest checkpoint if there is one, and commit.

    Args:
        store: for checkpoints.
        tell: called by the first worker.
        group: the workers, all of which call this.
        commit: called on all of them with the last state; its tensors are on the first one.

    Raises:
        DivergedError: the loss became NaN or exploded; the last good checkpoint stays.
    """
    settings = task.settings
    checkpoints = Checkpoints(store, task.checkpoints, keep_last=max(1, settings.keep_last))

    def on_start(step: int) -> None:
        if group.rank == 0:
            content = {"step": step, "workers": group.size, "time": time.time()}
            numbered.append(store.path(CHECKPOINTS, task.checkpoints, "starts"), content)
            tell("start", {"step": step, "workers": group.size})

    assert settings.checkpoint_every is not None
    fit(
        trainer,
        checkpoints,
        group,
        num_steps=task.num_steps,
        checkpoint_every=settings.checkpoint_every,
        on_step=history.add,
        on_start=on_start,
        beside={"history": history},
    )
    commit(trainer.snapshot())
    if group.rank == 0:
        if not settings.keep_last:
            checkpoints.remove_all()
        history.tell_step()


def starts_of(store: Store, checkpoints: str) -> list[dict[str, int]]:
    """Every start of a training, the first and those after a loss: `step` and `workers`."""
    folder = store.path(CHECKPOINTS, checkpoints, "starts")
    return [numbered.read_version(folder, number) for number in numbered.versions(folder)]


def evaluation_steps(num_steps: int, points: int) -> set[int]:
    """Steps to evaluate after, evenly spaced, the last one included."""
    return {round(num_steps * (i + 1) / points) for i in range(points)} - {0}


class History:
    """A training's curves, evaluations and times, kept in its checkpoints and told as they come.

    Losses are means over runs of steps, at most 500 in a training. Only what is computed is equal
    for equal trainings; seconds are as measured.

    Args:
        eval_points: evaluations over the training.
        tell: is told points, evaluations and steps.
        evaluate: measures, on all workers.
    """

    def __init__(self, num_steps: int, eval_points: int, tell: Tell, evaluate: Evaluate) -> None:
        self._tell, self._num_steps, self._measure = tell, num_steps, evaluate
        self._evaluations = evaluation_steps(num_steps, eval_points)
        self._every = -(-num_steps // _MAX_POINTS)
        self._run: list[StepRecord] = []
        self._last: StepRecord | None = None
        self._told = time.monotonic()
        self._state: dict[str, Any] = {
            "points": [],
            "evaluations": [],
            "loss": None,
            "seconds": 0.0,
            "data_wait_s": 0.0,
            "mfu_s": None,
        }

    def add(self, record: StepRecord) -> float | None:
        """Add a step; the held-out loss if it is measured after this step."""
        state, self._last = self._state, record
        state["seconds"] += record.seconds
        state["data_wait_s"] += record.data_wait_s
        state["loss"] = record.loss
        if record.mfu is not None:
            state["mfu_s"] = (state["mfu_s"] or 0.0) + record.mfu * record.seconds
        self._run.append(record)
        if record.step % self._every == 0 or record.step == self._num_steps:
            self._add_point()
        if time.monotonic() - self._told > _TELL_S:
            self.tell_step()
        return self._evaluate(record) if record.step in self._evaluations else None

    def _add_point(self) -> None:
        run, last = self._run, self._run[-1]
        seconds = sum(r.seconds for r in run)
        first = run[0].tokens - run[0].tokens_per_s * run[0].seconds
        point = {
            "step": last.step,
            "tokens": last.tokens,
            "loss": sum(r.loss for r in run) / len(run),
            "grad_norm": max(r.grad_norm for r in run),
            "learning_rate": last.learning_rate,
            "tokens_per_s": (last.tokens - first) / seconds,
            "data_wait_share": sum(r.data_wait_s for r in run) / seconds,
        }
        self._run = []
        self._state["points"].append(point)
        self._tell("point", point)

    def _evaluate(self, record: StepRecord) -> float | None:
        found, score = self._measure(record)
        evaluation = {"step": record.step, "tokens": record.tokens, **found}
        self._state["evaluations"].append(evaluation)
        self._tell("evaluation", evaluation | {"seconds": self._state["seconds"]})
        return score

    def tell_step(self) -> None:
        """Tell the last step."""
        self._told = time.monotonic()
        if self._last is not None:
            self._tell("step", {"step": self._last.step, "tokens": self._last.tokens})

    def state_dict(self) -> dict[str, Any]:
        return {**deepcopy(self._state), "run": [asdict(record) for record in self._run]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._run = [StepRecord(**record) for record in state["run"]]
        self._state = {key: deepcopy(value) for key, value in state.items() if key != "run"}


def training_totals(
    store: Store, checkpoints: str, snapshot: Snapshot, history: dict[str, Any]
) -> dict[str, Any]:
    """What the manifest of every trained model says of its training; `history` is the state."""
    progress, seconds = snapshot.progress, history["seconds"]
    return {
        "num_tokens": progress["tokens"],
        "num_steps": progress["step"],
        "order_sha256": progress["order_sha256"],
        "final_loss": history["loss"],
        "late_fall": late_fall([point["loss"] for point in history["points"]]),
        "evaluations": history["evaluations"],
        "points": history["points"],
        "measured": {
            "seconds": seconds,
            "tokens_per_second": progress["tokens"] / seconds,
            "data_wait_share": history["data_wait_s"] / seconds,
            "mfu": None if history["mfu_s"] is None else history["mfu_s"] / seconds,
            "halved_to": progress["halved_to"],
            "starts": starts_of(store, checkpoints),
        },
    }
