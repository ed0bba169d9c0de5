"""The two ways in which work reaches workers.

`stream_parts` feeds descriptors of parts through a Ray Data actor pool: the worker that needs a
part reads it itself from the store, so nothing large travels, a block's layout means nothing, and
a lost worker costs the part it held. `run_tasks` maps a function over small items as Ray tasks,
with a bounded number in flight.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias, TypeVar

import ray
from ray.exceptions import RayActorError

from stillhouse import errors
from stillhouse.actors.attempts import Attempts
from stillhouse.actors.part_worker import Failure, Host, PartWorker, cannot_import
from stillhouse.actors.results import get_result
from stillhouse.errors import ClusterError, StoreUnreachableError
from stillhouse.pipelines.context import Context, FailedAt, Unfinished
from stillhouse.storage.artifact import Receipt

T = TypeVar("T")
R = TypeVar("R")
Made: TypeAlias = tuple[Receipt | None, Failure | None, float]
"""A task's receipt, or why there is none, and the seconds that it took."""
Stream: TypeAlias = Callable[[list[Any]], Iterator[Made]]
"""Does tasks in any order."""
STORAGE_BUDGET = 5
"""How often a task may find the store out of reach, for as long as `retries` try each time."""
_IN_A_ROW = 40
"""So many such tasks without a finished one between them: the store is gone for all."""
_MAX_BLOCKS = 2000
_AHEAD = 4
"""Descriptors in a block where there are many: a worker reads one part ahead inside a block."""


def stream_parts(
    ctx: Context,
    step: str,
    *,
    kind: str,
    tasks: Sequence[Any],
    make: Callable[[], Host],
    workers: int | None,
    gpus: float = 0,
    options: Mapping[str, Any] | None = None,
    unit: str = "tokens",
) -> list[Receipt]:
    """Do every task whose receipt is not in the store yet; the receipts of all, in order.

    Args:
        ctx: the run.
        step: its name in progress, events and accounts.
        kind: where the receipts lie.
        tasks: descriptors with a `fingerprint`.
        make: builds the host in each worker process; small and picklable.
        workers: size of the pool, None for one on every CPU; the result does not depend on it.
        gpus: of each worker; without one it has `compute.cpus_per_worker`.
        options: Ray's, of each worker, instead.
        unit: what `Receipt.counts` is shown as the rate.

    Raises:
        PartFailedError: a part kept killing its worker. Any StillhouseError of a task.
    """
    stream = partial(_stream, ctx, step, kind, make, workers, gpus, options)
    return finish_parts(ctx, step, kind, tasks, stream, unit=unit)


def finish_parts(
    ctx: Context, step: str, kind: str, tasks: Sequence[Any], stream: Stream, *, unit: str
) -> list[Receipt]:
    """What `stream` makes of the tasks that are not finished, told and accounted; all receipts."""
    done = ctx.store.finished(kind, [task.fingerprint for task in tasks])
    todo = {t.fingerprint: t for t in tasks if t.fingerprint not in done}
    with ctx.step(step, total=len(tasks), reused=len(tasks) - len(todo), unit=unit) as advance:
        if todo:
            for receipt, seconds in _until_done(ctx, step, stream, todo):
                done[receipt.task] = receipt
                ctx.work[step].device_seconds += seconds
                advance(1, receipt.counts.get(unit, 0))
    return [done[task.fingerprint] for task in tasks]


def _until_done(
    ctx: Context, step: str, stream: Stream, todo: Mapping[str, Any]
) -> Iterator[tuple[Receipt, float]]:
    """Receipts and seconds; a task that could not reach the store is done again, elsewhere maybe.

    Raises:
        StoreUnreachableError: too often. Any other error of a task, with a note of where it was.
    """
    left, in_a_row = list(todo), 0
    unreached: Counter[str] = Counter()
    while left:
        again: list[str] = []
        for receipt, failure, seconds in stream([todo[name] for name in left]):
            if receipt is not None:
                in_a_row = 0
                yield receipt, seconds
                continue
            assert failure is not None
            in_a_row += 1
            unreached[failure.part] += 1
            final = in_a_row >= _IN_A_ROW or unreached[failure.part] >= STORAGE_BUDGET
            if failure.kind != StoreUnreachableError.__name__ or final:
                ctx.failed_at = FailedAt(step, failure.part, failure.node)
                raise as_error(failure.kind, failure.message)
            attempts_of(ctx).unreached.remote()
            ctx.listener.note("waiting", {"message": f"{failure.node}: {failure.message}"})
            again.append(failure.part)
        left = again


def _stream(
    ctx: Context,
    step: str,
    kind: str,
    make: Callable[[], Host],
    workers: int | None,
    gpus: float,
    options: Mapping[str, Any] | None,
    tasks: list[Any],
) -> Iterator[Made]:
    from ray.data import ActorPoolStrategy, from_items  # seconds, for who has no parts to do

    attempts = attempts_of(ctx)
    quiet()
    placed = options or ctx.compute.resources(gpus)
    cpus = int(ray.cluster_resources().get("CPU", 1) / ctx.compute.cpus_per_worker)
    size = min(workers or max(1, cpus), len(tasks))
    rows = [{"task": task} for task in tasks]
    per_block = max(-(-len(rows) // _MAX_BLOCKS), min(_AHEAD, len(rows) // (4 * size)), 1)
    dataset = from_items(rows, override_num_blocks=-(-len(rows) // per_block))
    results = dataset.map_batches(
        PartWorker,
        fn_constructor_kwargs={
            "make": make,
            "attempts": attempts,
            "store": ctx.store,
            "kind": kind,
            "metrics": ctx.metrics(step),
        },
        batch_size=per_block,  # Ray Data refuses None where workers have GPUs
        compute=ActorPoolStrategy(size=size),
        **placed,
    )
    for row in results.iter_rows():
        yield row["receipt"], row["error"], float(row["seconds"])


def attempts_of(ctx: Context) -> Any:
    """The run's Attempts actor, made for who asks first."""
    if ctx.attempts is None:
        ctx.attempts = Attempts.remote(ctx.compute.max_attempts, ctx.run)
    return ctx.attempts


def not_begun(error: RayActorError) -> ClusterError:
    """Why no worker could be started, where its creation raised: the last line of its trace."""
    lines = [line.strip() for line in str(error).splitlines()]
    return ClusterError(cannot_import(next(line for line in reversed(lines) if line)))


def as_error(name: str, message: str) -> Exception:
    """An error that was raised elsewhere: one of our own by its class's name."""
    kind = getattr(errors, name, None)
    return kind(message) if kind is not None else RuntimeError(message)


def quiet() -> None:
    """Our own progress is shown instead of Ray Data's; a failing part is our own error."""
    from ray.data import DataContext

    for name in [n for n in logging.root.manager.loggerDict if n.startswith("ray.data")]:
        logging.getLogger(name).setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = False


def run_tasks(
    ctx: Context, function: Callable[[T], R], items: Iterable[T], *, in_flight: int = 64
) -> Iterator[R]:
    """`map(function, items)` as Ray tasks: results in order, at most `in_flight` waiting."""
    remote = ray.remote(num_cpus=ctx.compute.cpus_per_worker)(_call)
    waiting: deque[tuple[T, ray.ObjectRef[R]]] = deque()

    def result() -> R:
        item, reference = waiting.popleft()
        for _ in range(STORAGE_BUDGET - 1):
            try:
                return get_result(reference)
            except StoreUnreachableError as error:
                ctx.listener.note("waiting", {"message": str(error)})
                reference = remote.remote(function, item)
        return get_result(reference)

    for item in items:
        if ctx.dry:
            raise Unfinished("small tasks")
        if len(waiting) >= in_flight:
            yield result()
        waiting.append((item, remote.remote(function, item)))
    while waiting:
        yield result()


def _call(function: Callable[[T], R], item: T) -> R:
    return function(item)


def runner(ctx: Context) -> Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]:
    """`run_tasks` in the form that `stillhouse.selection.budget` takes as `run`."""
    return partial(run_tasks, ctx)
