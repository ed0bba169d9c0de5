"""Trainings in one group of workers: of `job: train` and of the models of `job: select`.

All workers share a training; or, if there are several that fit on one worker each, every worker
does some of them alone, one after another. In each worker Ray Data fetches windows of the parts
ahead of the training, or scorers choose its batches; checkpoints are written in the background.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import ray

from stillhouse.actors.pool_worker import get_result
from stillhouse.classification.task import ClassifyTask
from stillhouse.errors import StillhouseError
from stillhouse.models.shape import ModelShape
from stillhouse.pipelines.context import Context, FailedAt
from stillhouse.pipelines.placement import actor_options
from stillhouse.pipelines.tokens import TokenizerRef
from stillhouse.pipelines.workers import STEP, Gang
from stillhouse.spec import ComputeSettings, ModelSettings, Optimisation
from stillhouse.storage.artifact import Manifest, Store
from stillhouse.training.spec import TrainingSettings
from stillhouse.training.task import (
    Start,
    StartModel,
    Tell,
    TokenSet,
    TrainTask,
    choose,
    with_order,
)

LOOK_AHEAD = 4
"""Windows scored before they are needed, so that a slow one does not stall the training."""
_SMALL_TOKENS = 8 << 20
"""Data of fewer tokens are read by a thread and cached: Ray Data takes seconds to start."""
AnyTrainTask = TrainTask | ClassifyTask


def make_task(
    compute: ComputeSettings,
    tokenizer: TokenizerRef,
    shape: ModelShape,
    data: Sequence[TokenSet],
    settings: TrainingSettings,
    num_tokens: float,
    *,
    role: str,
    label: str,
    init: ModelSettings | StartModel,
    start: Start = "fresh",
    heldout: TokenSet | None = None,
) -> TrainTask:
    """A training of a model of `shape` on about `num_tokens`; `auto` settings are resolved."""
    length = data[0].sequence_length
    settings = choose(
        settings,
        width=shape.hidden_size,
        num_tokens=num_tokens,
        sequence_length=length,
        start=start,
    )
    num_steps = max(1, round(num_tokens / (length * settings.batch_size)))
    return TrainTask(
        role=role,
        label=label,
        init=init,
        data=tuple(data),
        heldout=heldout,
        settings=with_order(settings, data, num_steps),
        num_steps=num_steps,
        tokenizer=tokenizer.path,
        tokenizer_digest=tokenizer.digest,
        eos_token=tokenizer.eos_token,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        device=compute.device,
        gpus=compute.trainer_gpus,
    )


def train_models(
    ctx: Context,
    gang: Gang,
    step: str,
    tasks: Sequence[TrainTask],
    shape: ModelShape,
    scorers: Sequence[Any] = (),
    beside: float = 0.0,
) -> list[Manifest]:
    """Train every model that is not in the store yet; the manifests of all, in order.

    Args:
        gang: the workers, started if there is something to train.
        step: its name in progress and accounts.
        tasks: the trainings; equal ones are done once.
        shape: of the models, to account for their FLOPs.
        scorers: actors that choose the batches online.
        beside: FLOPs a token of teachers that run in the training workers.

    Raises:
        DivergedError, ArtifactError: as `train_worker`. PartFailedError, ClusterError: as
            `Gang.run`.
    """
    passes = 3.0 if tasks[0].lora is None else 2.0  # frozen weights have no gradients
    each = passes * shape.flops_per_token(tasks[0].sequence_length) + beside
    made = run_trainings(ctx, gang, step, tasks, scorers=scorers, flops=each)
    work, distinct = ctx.work[step], {one.fingerprint: one for one in made}
    work.tokens += sum(one.totals["num_tokens"] for one in distinct.values())
    work.flops = each * work.tokens
    return made


def run_trainings(
    ctx: Context,
    gang: Gang,
    step: str,
    tasks: Sequence[AnyTrainTask],
    unit: str = "tokens",
    scorers: Sequence[Any] = (),
    flops: float = 0.0,
) -> list[Manifest]:
    """The same for models of any kind, without an account of tokens and FLOPs; `unit` is what a
    step of progress counts, `flops` are those of one.
    """
    by_name = {task.fingerprint: task for task in tasks}
    todo = [t for name, t in by_name.items() if ctx.store.find_manifest("models", name) is None]
    reused = len(by_name) - len(todo)
    with ctx.step(step, total=len(by_name), reused=reused, unit=unit) as advance:
        if todo:
            note_recipe(ctx, step, todo[0].settings, "sequences" if unit == "tokens" else unit)
            progress = _TrainProgress(ctx, step, todo, advance, flops)
            work = partial(_work, ctx.store, tuple(todo), tuple(scorers))
            what = f"training {todo[0].label!r}" if len(todo) == 1 else f"{len(todo)} trainings"
            try:
                gang.run(what, work, progress.on_event)
            except StillhouseError:
                ctx.failed_at = FailedAt(step, progress.current, gang.failed_on)
                raise
    made = {name: ctx.store.get_manifest("models", name) for name in by_name}
    work = ctx.work[step]
    for task in todo:
        measured = made[task.fingerprint].totals["measured"]
        busy = measured["seconds"] * measured["starts"][-1]["workers"]
        work.worked(busy, ctx.compute.resources(ctx.compute.trainer_gpus))
    sizes = (4 * manifest.totals.get("num_parameters", 0) for manifest in made.values())
    work.num_bytes += sum(sizes)
    return [made[task.fingerprint] for task in tasks]


def note_recipe(ctx: Context, step: str, settings: Optimisation, rows: str = "sequences") -> None:
    """Report the learning rate and batch, which may have been `auto`; `rows` are a batch's."""
    rate, batch = settings.peak_rate, settings.batch_size
    message = f"{step}: learning rate {rate:g}, {batch:,} {rows} a step"
    content = {"step": step, "learning_rate": rate, "global_batch": batch, "message": message}
    ctx.listener.note("recipe", content)


class _TrainProgress:
    """Advances a step with its trainings' events, and notes what else they report.

    Attributes:
        current: label of the training with the latest event.
    """

    def __init__(
        self,
        ctx: Context,
        step: str,
        tasks: Sequence[AnyTrainTask],
        advance: Callable[[float, float], None],
        flops: float,
    ) -> None:
        self._ctx, self._step_name, self._advance = ctx, step, advance
        self._tasks = {task.fingerprint: task for task in tasks}
        self._steps, self._workers = dict.fromkeys(self._tasks, 0), dict.fromkeys(self._tasks, 1)
        self._flops = flops
        self._started: set[str] = set()
        self.current = tasks[0].label

    def on_event(self, kind: str, content: dict[str, Any]) -> None:
        """See `OnEvent`."""
        name, step = content["training"], content.get("step", 0)
        task = self._tasks[name]
        self.current = task.label
        if kind == "start":
            if name in self._started:
                self._ctx.metrics(self._step_name).retry("program")
            self._started.add(name)
            self._workers[name] = content["workers"]
        moved = step - self._steps[name]
        if kind in (STEP, "start") and moved > 0:
            units = moved * task.step_units
            self._advance(moved / task.num_steps, units if kind == STEP else 0)
            self._steps[name] = step
        if kind not in (STEP, "failed"):
            told = {**content, "training": task.label}
            if kind == "evaluation":
                cost = {
                    "flops": step * task.step_units * self._flops,
                    "device_seconds": content["seconds"] * self._workers[name],
                }
                told |= {"num_steps": task.num_steps, "cost": cost}
            self._ctx.listener.note(f"train {kind}", told)


def _work(store: Store, tasks: Sequence[AnyTrainTask], scorers: Sequence[Any], tell: Tell) -> None:
    """In each worker. A training is not shared where each worker has one of its own, nor where the
    data have fewer lanes than there are workers.
    """
    from stillhouse.training.group import WorkerGroup  # torch, which the driver does not need

    group = WorkerGroup.current()
    done = [t.fingerprint for t in tasks if store.find_manifest("models", t.fingerprint)]
    done = group.gather(done)[0]  # the first worker decides: another may see one more done
    todo = [task for task in tasks if task.fingerprint not in done]
    few = len(todo) < group.size or len(todo) == 1
    alone: list[AnyTrainTask] = []
    for task in todo:
        if (few or task.sharded) and (task.settings.lanes or 1) >= group.size:
            _train(store, task, scorers, tell, WorkerGroup.current(sharded=task.sharded))
        else:
            alone.append(task)
    for task in alone[group.rank :: group.size]:
        _train(store, task, scorers, tell, WorkerGroup())


def _train(
    store: Store, task: AnyTrainTask, scorers: Sequence[Any], tell: Tell, group: Any
) -> None:
    def tell_of_task(kind: str, content: dict[str, Any]) -> None:
        tell(kind, {**content, "training": task.fingerprint})

    try:
        if isinstance(task, ClassifyTask):
            from stillhouse.classification.worker import train_classifier

            train_classifier(store, task, tell_of_task, group)
        else:
            _train_language(store, task, scorers, tell_of_task, group)
    except Exception:
        tell_of_task("failed", {})
        raise


def _train_language(
    store: Store, task: TrainTask, scorers: Sequence[Any], tell: Tell, group: Any
) -> None:
    from stillhouse.actors.windows import WindowTeacher
    from stillhouse.pipelines.fetch import Stage, stream_windows
    from stillhouse.training.fetch import PartReader, read_ahead
    from stillhouse.training.worker import (
        online_batches,
        signals_wanted,
        streamed_batches,
        train_worker,
    )

    if task.online is not None:
        source = partial(online_batches, task, ask_ahead(scorers, task.num_steps))
    else:
        reader = PartReader.of(task.data, signals_wanted(task))
        if task.live is not None:
            options = actor_options(task.live, task.live.scorer)
            workers = max(1, task.live.scorers // group.size)
            stage = Stage(WindowTeacher, (reader, task, store), workers, options)
            fetch = stream_windows(reader, direct=0, stage=stage)
        elif sum(one.num_tokens for one in task.data) <= _SMALL_TOKENS:
            fetch = read_ahead(reader, 1)
        else:
            lanes = -(-(task.settings.lanes or 1) // group.size)
            fetch = stream_windows(reader, direct=lanes * len(task.data))
        source = partial(streamed_batches, task, fetch)
    train_worker(store, task, source, tell, group)


@contextmanager
def online_scorers(ctx: Context, task: TrainTask) -> Generator[tuple[list[Any], dict[str, float]]]:
    """Actors that choose a training's batches, and the resources that these or live teachers hold.

    `compute.scorers` of them and at most one a lane; none if nothing is to be trained. They load
    their models on first use.
    """
    if ctx.dry or ctx.store.find_manifest("models", task.fingerprint):
        yield [], {}
        return
    if task.online is None:
        held = {}
        if task.live is not None:  # started by the training workers
            options = actor_options(ctx.compute, ctx.compute.scorer)
            count = max(ctx.compute.trainers, ctx.compute.scorers)
            held = {"CPU": count * options["num_cpus"], "GPU": count * options["num_gpus"]}
        yield [], held
        return
    from stillhouse.actors.windows import OnlineScorer

    ctx.close_pool()
    count = min(ctx.compute.scorers, task.online.lanes)
    options = actor_options(ctx.compute, ctx.compute.scorer)
    actor: Any = OnlineScorer
    scorers = [
        actor.options(**options).remote(task, rank, count, 2 * LOOK_AHEAD + 2)
        for rank in range(count)
    ]
    try:
        yield scorers, {"CPU": count * options["num_cpus"], "GPU": count * options["num_gpus"]}
    finally:
        for scorer in scorers:
            ray.kill(scorer)


def ask_ahead(scorers: Sequence[Any], num_windows: int) -> Callable[[int], list[Any]]:
    """An `Ask` that requests windows before they are needed; made in each training worker."""
    waiting: dict[int, list[Any]] = {}

    def ask(number: int) -> list[Any]:
        for ahead in range(number, min(number + LOOK_AHEAD + 1, num_windows)):
            if ahead not in waiting:
                waiting[ahead] = [scorer.window.remote(ahead) for scorer in scorers]
        return get_result(waiting.pop(number))

    return ask
