"""Trainings of language models in one group of workers: of `job: train` and of `job: select`.

A training is shared by all workers, or, where there are several and one worker holds each, every
worker does some of them alone, one after the other. In each worker Ray Data fetches windows of the
parts ahead of the training; checkpoints go to the store in the background; a lost worker's group
begins again at the last one.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from stillhouse.errors import StillhouseError
from stillhouse.models.shape import ModelShape
from stillhouse.pipelines.context import Context, FailedAt
from stillhouse.pipelines.workers import STEP, Gang
from stillhouse.spec import Optimisation
from stillhouse.storage.artifact import Manifest, Store
from stillhouse.training.task import Tell, TrainTask

_SMALL_TOKENS = 8 << 20
"""Data of fewer tokens are read once, and kept, by a thread: no Ray Data is started for them."""


def train_models(
    ctx: Context,
    gang: Gang,
    step: str,
    tasks: Sequence[TrainTask],
    shape: ModelShape,
    scorers: Sequence[Any] = (),
) -> list[Manifest]:
    """Train every model that is not in the store yet; the manifests of all, in order.

    Args:
        ctx: the run.
        gang: the workers; started where there is something to train.
        step: its name in progress and accounts.
        tasks: the trainings; equal ones are done once.
        shape: of the models, to account for their FLOPs.
        scorers: actors that choose the batches online.

    Raises:
        DivergedError, ArtifactError: as `train_worker`. PartFailedError, ClusterError: as
            `Gang.run`.
    """
    by_name = {task.fingerprint: task for task in tasks}
    found = {name: ctx.store.find_manifest("models", name) for name in by_name}
    todo = [task for name, task in by_name.items() if found[name] is None]
    with ctx.step(step, total=len(by_name), reused=len(by_name) - len(todo)) as advance:
        if todo:
            tell_recipe(ctx, step, todo[0].settings)
            follow = _Follower(ctx, step, todo, advance)
            work = partial(_work, ctx.store, tuple(todo), tuple(scorers))
            what = f"training {todo[0].label!r}" if len(todo) == 1 else f"{len(todo)} trainings"
            try:
                gang.run(what, work, follow.hear)
            except StillhouseError:
                ctx.failed_at = FailedAt(step, follow.current, gang.failed_on)
                raise
    made = {name: ctx.store.get_manifest("models", name) for name in by_name}
    work = ctx.work[step]
    work.tokens += sum(one.totals["num_tokens"] for one in made.values())
    work.flops = 3.0 * shape.flops_per_token(tasks[0].sequence_length) * work.tokens
    for task in todo:
        measured = made[task.fingerprint].totals["measured"]
        work.device_seconds += measured["seconds"] * measured["starts"][-1]["workers"]
    return [made[task.fingerprint] for task in tasks]


def tell_recipe(ctx: Context, step: str, settings: Optimisation) -> None:
    """Say how models are about to be trained: what `auto` became."""
    rate, batch = settings.peak_rate, settings.batch_size
    said = f"{step}: learning rate {rate:g}, {batch:,} sequences a step"
    content = {"step": step, "learning_rate": rate, "global_batch": batch, "message": said}
    ctx.listener.note("recipe", content)


class _Follower:
    """Lets a step's progress move to where its trainings are, and keeps what they tell."""

    def __init__(self, ctx: Context, step: str, tasks: Sequence[TrainTask], advance: Any) -> None:
        self._ctx, self._step_name, self._advance = ctx, step, advance
        self._tasks = {task.fingerprint: task for task in tasks}
        self._steps = dict.fromkeys(self._tasks, 0)
        self._started: set[str] = set()
        self.current = tasks[0].label
        """The training that was last told of."""

    def hear(self, kind: str, content: dict[str, Any]) -> None:
        """Take one of the workers' news."""
        name, step = content["training"], content.get("step", 0)
        task = self._tasks[name]
        self.current = task.label
        if kind == "start":
            if name in self._started:
                self._ctx.metrics(self._step_name).retry("program")
            self._started.add(name)
        moved = step - self._steps[name]
        if kind in (STEP, "start") and moved > 0:
            tokens = moved * task.settings.batch_size * task.sequence_length
            self._advance(moved / task.num_steps, tokens if kind == STEP else 0)
            self._steps[name] = step
        if kind not in (STEP, "failed"):
            self._ctx.listener.note(f"train {kind}", {**content, "training": task.label})


def _work(store: Store, tasks: Sequence[TrainTask], scorers: Sequence[Any], tell: Tell) -> None:
    """In each worker; the driver needs none of these modules, and some take seconds."""
    from stillhouse.training.group import WorkerGroup

    group = WorkerGroup.current()
    there = [t.fingerprint for t in tasks if store.find_manifest("models", t.fingerprint)]
    there = group.gather(there)[0]  # the first worker decides: another may be done meanwhile
    todo = [task for task in tasks if task.fingerprint not in there]
    shared = [task for task in todo if _is_shared(task, len(todo), group.size)]
    alone = [task for task in todo if task not in shared]
    for task in shared:
        together = WorkerGroup.current(sharded=task.settings.sharding == "fsdp")
        _train(store, task, scorers, tell, together)
    for task in alone[group.rank :: group.size]:
        _train(store, task, scorers, tell, WorkerGroup())


def _is_shared(task: TrainTask, num_tasks: int, num_workers: int) -> bool:
    """Whether all workers train one model together: not where each has one of its own, nor where
    there is not a lane of the data for each of them.
    """
    enough = num_tasks < num_workers or task.settings.sharding == "fsdp" or num_tasks == 1
    return enough and (task.settings.lanes or 1) >= num_workers


def _train(store: Store, task: TrainTask, scorers: Sequence[Any], tell: Tell, group: Any) -> None:
    from stillhouse.pipelines.fetch import stream_windows
    from stillhouse.training.fetch import PartReader, read_ahead
    from stillhouse.training.worker import (
        online_batches,
        signals_wanted,
        streamed_batches,
        train_worker,
    )

    def say(kind: str, content: dict[str, Any]) -> None:
        tell(kind, {**content, "training": task.fingerprint})

    if task.online is not None:
        from stillhouse.pipelines.online import ask_ahead

        source = partial(online_batches, task, ask_ahead(scorers, task.num_steps))
    else:
        reader = PartReader.of(task.data, signals_wanted(task))
        if sum(one.num_tokens for one in task.data) <= _SMALL_TOKENS:
            fetch = read_ahead(reader, 1)
        else:
            lanes = -(-(task.settings.lanes or 1) // group.size)
            fetch = stream_windows(reader, direct=lanes * len(task.data))
        source = partial(streamed_batches, task, fetch)
    try:
        train_worker(store, task, source, say, group)
    except Exception:
        say("failed", {})
        raise
