"""Distillations in Distiller actors: one, or several that share every batch."""

from dataclasses import replace
from time import perf_counter
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from stillhouse.actors.distiller import Distiller
from stillhouse.actors.image_worker import ImageWork
from stillhouse.actors.part_worker import cannot_import
from stillhouse.actors.results import get_result
from stillhouse.distillation.matching_job import KIND, MatchingTask
from stillhouse.errors import ClusterError, PartFailedError
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.flow import not_begun
from stillhouse.pipelines.placement import actor_options
from stillhouse.pipelines.workers import group_size, room
from stillhouse.storage.artifact import Receipt

STEP = "distil"
_POLL_S = 0.5


def distil(ctx: Context, work: ImageWork, task: MatchingTask) -> list[Receipt]:
    """The receipts of a distillation's points, in order; it is run, or gone on with, if need be.

    Raises:
        PartFailedError: its workers kept dying. ClusterError: they lack code. DivergedError:
            nothing was learned.
    """
    names = [task.receipt(point) for point in task.points]
    done = ctx.store.finished(KIND, names)
    total, reused = len(names), len(done)
    with ctx.step(STEP, total=total, reused=reused, unit="iterations") as advance:
        started = perf_counter()
        lost = 0
        while len(done) < total:
            try:
                _run(ctx, work, task, reused, advance)
            except (RayActorError, RayTaskError) as error:
                if isinstance(error, RayActorError) and error.actor_init_failed:
                    raise not_begun(error) from None
                if isinstance(error, RayTaskError) and ctx.compute.distillers == 1:
                    raise
                lost += 1  # several: the others of a lost one fail in their sums
                if lost >= ctx.compute.max_attempts:
                    raise PartFailedError(
                        f"the distillation lost its worker {lost} times (out of memory?): raise "
                        "`compute.max_attempts`, or lower `method.batch_size`"
                    ) from None
            done = ctx.store.finished(KIND, names)
        if reused < total:
            ctx.work[STEP].device_seconds += (perf_counter() - started) * ctx.compute.distillers
    return [done[name] for name in names]


def _run(ctx: Context, work: ImageWork, task: MatchingTask, reused: int, advance: Any) -> None:
    """One attempt with fresh workers; a lost one takes the others with it."""
    size = ctx.compute.distillers
    group = replace(group_size(ctx.compute), num_workers=size, min_workers=size)
    with room(ctx, group, "the distillation", setting="compute.distillers"):
        pass  # they begin together: without room for all of them they would wait for ever
    maker: Any = Distiller
    options = actor_options(ctx.compute, ctx.compute.trainer)
    actors = [
        maker.options(max_concurrency=2, **options).remote(ctx.store, work) for _ in range(size)
    ]
    try:
        address = ray.get(actors[0].address.remote())
        waiting = [actor.run.remote(task, rank, size, address) for rank, actor in enumerate(actors)]
        shown = float(reused)
        while waiting:
            ready, waiting = ray.wait(waiting, timeout=_POLL_S)
            for reference in ready:
                _result(reference)
            shown = _show(actors[0], len(task.points), shown, advance)
    finally:
        for actor in actors:
            ray.kill(actor)


def _result(reference: Any) -> None:
    try:
        get_result(reference)
    except RayTaskError as error:
        if isinstance(error.cause, ImportError):
            raise ClusterError(cannot_import(str(error.cause))) from None
        raise


def _show(actor: Any, points: int, shown: float, advance: Any) -> float:
    """Tell the progress; how many points' worth were told."""
    try:
        done, total = ray.get(actor.progress.remote(), timeout=_POLL_S)
    except (RayActorError, GetTimeoutError):
        return shown
    now = max(points * done / total, shown) if total else shown
    advance(now - shown, (now - shown) * (total or 0) / points)
    return now
