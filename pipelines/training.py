"""Trainings in trainer actors, several side by side; a lost actor's training starts again."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from stillhouse.actors.results import get_result
from stillhouse.actors.trainer import TrainerActor
from stillhouse.errors import PartFailedError, StillhouseError
from stillhouse.pipelines.context import Context, FailedAt
from stillhouse.pipelines.placement import actor_options
from stillhouse.spec import Optimisation
from stillhouse.storage.artifact import Manifest
from stillhouse.training.task import ModelTask

_POLL_S = 0.5
_NODE_WAIT_S = 5.0


@dataclass
class _Running:
    task: ModelTask
    actor: Any
    share: float = 0.0
    """Of its steps, as far as it was told."""
    started: float = field(default_factory=perf_counter)

    def tell(self, advance: Any, share: float) -> None:
        """Let the step's progress move to where this training is."""
        moved = share - self.share
        advance(moved, moved * self.task.num_tokens)
        self.share = share


def tell_recipe(ctx: Context, step: str, settings: Optimisation) -> None:
    """Say how models are about to be trained: what `auto` became."""
    rate, batch = settings.peak_rate, settings.batch_size
    said = f"{step}: learning rate {rate:g}, {batch:,} sequences a step"
    content = {"step": step, "learning_rate": rate, "global_batch": batch, "message": said}
    ctx.listener.note("recipe", content)


def train_models(
    ctx: Context, step: str, tasks: Sequence[ModelTask], flops_per_token: float
) -> list[Manifest]:
    """Train every model that is not in the store yet; the manifests of all, in order.

    Args:
        ctx: the run; `compute.trainers` trainings run side by side.
        step: its name in progress and accounts.
        tasks: the trainings; equal ones are done once.
        flops_per_token: of a forward pass; training counts three.

    Raises:
        PartFailedError: a training kept killing its worker. DivergedError: a loss became NaN.
    """
    found = {t.fingerprint: ctx.store.find_manifest("models", t.fingerprint) for t in tasks}
    todo = list({t.fingerprint: t for t in tasks if found[t.fingerprint] is None}.values())
    reused = len(found) - len(todo)
    with ctx.step(step, total=len(found), reused=reused, unit="tokens") as advance:
        if todo:
            tell_recipe(ctx, step, todo[0].settings)
            found |= _train_all(ctx, step, todo, advance)
    work = ctx.work[step]
    work.tokens += sum(task.num_tokens for task in {t.fingerprint: t for t in tasks}.values())
    work.flops = 3 * flops_per_token * work.tokens
    done = [found[task.fingerprint] for task in tasks]
    return [manifest for manifest in done if manifest is not None]


def _train_all(ctx: Context, step: str, todo: list[ModelTask], advance: Any) -> dict[str, Manifest]:
    ctx.close_pool()
    waiting = list(reversed(todo))
    width = min(ctx.compute.trainers, len(todo))
    threads = ctx.compute.threads_per_worker
    running: dict[Any, _Running] = {}
    idle = [_actor(ctx, threads) for _ in range(width)]
    done: dict[str, Manifest] = {}
    lost: Counter[str] = Counter()
    while waiting or running:
        while waiting and idle:
            task, actor = waiting.pop(), idle.pop()
            running[actor.train.remote(task)] = _Running(task, actor)
        ready, _ = ray.wait(list(running), timeout=_POLL_S)
        for reference in ready:
            ended = running.pop(reference)
            ctx.work[step].device_seconds += perf_counter() - ended.started
            try:
                done[ended.task.fingerprint] = get_result(reference)
            except RayActorError:
                lost[ended.task.fingerprint] += 1
                ctx.metrics(step).retry("program")
                _give_up(ctx, step, ended.task, lost[ended.task.fingerprint])
                waiting.append(ended.task)
                idle.append(_actor(ctx, threads))
                ended.tell(advance, 0.0)
                continue
            except (StillhouseError, RayTaskError):
                ctx.failed_at = FailedAt(step, ended.task.label, _node(ended.actor))
                raise
            if waiting:
                idle.append(ended.actor)
            else:
                ray.kill(ended.actor)  # another one may wait for its GPU
            ended.tell(advance, 1.0)
        for state in running.values():
            _show(state, advance)
    for actor in idle:
        ray.kill(actor)
    return done


def _node(actor: Any) -> str | None:
    """The address of the node that an actor runs on."""
    try:
        return ray.get(actor.node.remote(), timeout=_NODE_WAIT_S)
    except (RayActorError, GetTimeoutError):
        return None


def _actor(ctx: Context, threads: int) -> Any:
    options = actor_options(ctx.compute, ctx.compute.trainer)
    actor: Any = TrainerActor
    return actor.options(**options, max_concurrency=2).remote(ctx.store, threads)


def _give_up(ctx: Context, step: str, task: ModelTask, lost: int) -> None:
    if lost >= ctx.compute.max_attempts:
        ctx.failed_at = FailedAt(step, task.label)
        raise PartFailedError(
            f"training {task.label!r} lost its worker {lost} times (out of memory?): raise "
            "`compute.max_attempts`, or lower `micro_batch`"
        )


def _show(state: _Running, advance: Any) -> None:
    try:
        step, num_steps = ray.get(state.actor.progress.remote(), timeout=_POLL_S)
    except (RayActorError, GetTimeoutError):
        return
    if num_steps:
        state.tell(advance, 0.999 * step / num_steps)
