"""The two ways in which work reaches workers.

`stream_parts` feeds descriptors of parts through a Ray Data actor pool: the worker that needs a
part reads it itself from the store, so nothing large travels, a block's layout means nothing, and
a lost worker costs the part it held. `run_tasks` maps a function over small items as Ray tasks,
with a bounded number in flight.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from ray.exceptions import RayActorError

from stillhouse.actors.attempts import Attempts
from stillhouse.actors.part_worker import Failure, cannot_import
from stillhouse.errors import ClusterError, StoreUnreachableError
from stillhouse.pipelines.context import Context, FailedAt
from stillhouse.pipelines.pool import as_error
from stillhouse.pipelines.steps import run_tasks
from stillhouse.storage.artifact import Receipt

__all__ = ["as_error", "run_tasks"]  # for modules that are moving
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


def attempts_of(ctx: Context) -> Any:
    """The run's Attempts actor, made for who asks first."""
    if ctx.attempts is None:
        ctx.attempts = Attempts.remote(ctx.compute.max_attempts, ctx.run)
    return ctx.attempts


def not_begun(error: RayActorError) -> ClusterError:
    """Why no worker could be started, where its creation raised: the last line of its trace."""
    lines = [line.strip() for line in str(error).splitlines()]
    return ClusterError(cannot_import(next(line for line in reversed(lines) if line)))


def quiet() -> None:
    """Our own progress is shown instead of Ray Data's; a failing part is our own error."""
    from ray.data import DataContext

    for name in [n for n in logging.root.manager.loggerDict if n.startswith("ray.data")]:
        logging.getLogger(name).setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = False
