"""Steps of a job: tasks that are done or found finished, and small functions on workers."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from stillhouse.actors.pool_worker import Done, HostSettings
from stillhouse.compute_settings import WorkerSettings
from stillhouse.pipelines.context import Context, FailedAt, Unfinished
from stillhouse.storage.artifact import Receipt
from stillhouse.storage.task import Task

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Step:
    """Tasks of one kind.

    Attributes:
        title: in progress, events and accounts.
        tasks: what has to be done, in order; equal ones are done once.
        host: what workers keep from task to task; None where tasks need nothing.
        workers: at most so many; None for one on every CPU. The result does not depend on it.
        on: what workers need of their nodes; None for `compute.cpus_per_worker` alone.
        unit: the count of a receipt that is shown as the rate.
    """

    title: str
    tasks: Sequence[Task]
    host: HostSettings | None = None
    workers: int | None = None
    on: WorkerSettings | None = None
    unit: str = "tokens"


def perform(ctx: Context, step: Step) -> list[Receipt]:
    """Do every task whose receipt is not in the store yet; the receipts of all, in order.

    Raises:
        Unfinished: a dry run has something to do. PartFailedError: a task kept killing its
        worker. Any error of a task.
    """
    tasks = {task.fingerprint: task for task in step.tasks}
    kinds = {task.KIND for task in step.tasks}
    done = {n: r for kind in kinds for n, r in ctx.store.finished(kind, list(tasks)).items()}
    todo = deque(name for name in tasks if name not in done)
    total, reused = len(step.tasks), len(step.tasks) - len(todo)
    with ctx.step(step.title, total=total, reused=reused, unit=step.unit) as advance:
        if todo:
            work = ctx.work[step.title]
            for receipt, seconds in _done(ctx, step, [tasks[name] for name in todo]):
                done[receipt.task] = receipt
                work.device_seconds += seconds
                advance(1, receipt.counts.get(step.unit, 0))
    return [done[task.fingerprint] for task in step.tasks]


def _done(ctx: Context, step: Step, todo: list[Task]) -> Iterator[tuple[Receipt, float]]:
    from stillhouse.pipelines.pool import Call  # Ray, where there is something to do

    calls = deque(Call(task.fingerprint, "do", (task, step.host)) for task in todo)
    for _, found in _run(ctx, step.title, calls, step.workers, step.on):
        yield found.value, found.seconds


def run_tasks(
    ctx: Context, function: Callable[[T], R], items: Iterable[T], *, in_flight: int = 64
) -> Iterator[R]:
    """`map(function, items)` on workers: results in order, at most `in_flight` waiting."""
    left, index = enumerate(items), 0
    first = list(islice(left, in_flight))
    if not first:
        return
    if ctx.dry:
        raise Unfinished("small tasks")
    from stillhouse.pipelines.pool import Call

    calls = deque(Call(str(i), "call", (function, item)) for i, item in first)
    waiting: dict[int, R] = {}
    for call, found in _run(ctx, "", calls, None, None):
        waiting[int(call.name)] = found.value
        while index in waiting:
            yield waiting.pop(index)
            index += 1
            calls.extend(Call(str(i), "call", (function, item)) for i, item in islice(left, 1))


def _run(
    ctx: Context, title: str, calls: deque[Any], workers: int | None, on: WorkerSettings | None
) -> Iterator[tuple[Any, Done]]:
    """Make calls on the workers that the run has, or that it starts now."""
    from stillhouse.pipelines.placement import actor_options, num_cpus
    from stillhouse.pipelines.pool import Pool, TaskFailed

    compute = ctx.compute
    options = compute.resources(0) if on is None else actor_options(compute, on)
    if ctx.pool is None or ctx.pool.options != options:
        ctx.close_pool()
        ctx.pool = Pool(ctx.store, options, compute.max_attempts, ctx.listener.note)
    width = workers or max(1, int(num_cpus() / compute.cpus_per_worker))
    try:
        yield from ctx.pool.run(calls, width, ctx.metrics(title))
    except TaskFailed as failed:
        if title:
            ctx.failed_at = FailedAt(title, failed.name, failed.node)
        raise failed.error from None
    finally:
        if ctx.pool.at_work:
            ctx.close_pool()
