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
from stillhouse.errors import ArtifactError, ClusterError, LostPeerError, PartFailedError
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.flow import not_begun
from stillhouse.pipelines.placement import actor_options
from stillhouse.pipelines.workers import group_size, room
from stillhouse.storage.artifact import Receipt

STEP = "distil"
_POLL_S = 0.5
_LAST_WORDS_S = 10.0
"""How long the other workers of a lost one may take to say why: one of them may have failed."""


def distil(ctx: Context, work: ImageWork, task: MatchingTask) -> list[Receipt]:
    """The receipts of a distillation's points, in order; it is run, or gone on with, if need be.

    Raises:
        PartFailedError: its workers kept dying. ClusterError: they lack code. DivergedError:
            nothing was learned. ArtifactError: sets were deleted meanwhile. Any error of a worker.
    """
    names = [task.receipt(point) for point in task.points]
    done = ctx.store.finished(KIND, names)
    total, reused = len(names), len(done)
    with ctx.step(STEP, total=total, reused=reused, unit="iterations") as advance:
        started = perf_counter()
        lost = 0
        while len(done) < total:
            failure = _run(ctx, work, task, reused, advance)
            if failure is not None:
                lost += 1
                if lost >= ctx.compute.max_attempts:
                    reason = str(failure).splitlines()[0]
                    raise PartFailedError(
                        f"the distillation lost its workers {lost} times, at last by: {reason} "
                        "(out of memory?): raise `compute.max_attempts`, or lower "
                        "`method.batch_size`"
                    )
            done = ctx.store.finished(KIND, names)
            if failure is None and len(done) < total:
                raise ArtifactError(
                    f"{total - len(done)} of the distillation's {total} sets were deleted from "
                    f"{ctx.store.path(KIND)} while it ran: run the job again"
                )
        if reused < total:
            ctx.work[STEP].device_seconds += (perf_counter() - started) * ctx.compute.distillers
    return [done[name] for name in names]


def _run(
    ctx: Context, work: ImageWork, task: MatchingTask, reused: int, advance: Any
) -> Exception | None:
    """One attempt with fresh workers: how one was lost, which takes the others with it, or None.

    Raises:
        Exception: what a worker raised by itself.
    """
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
        shown, lost = float(reused), None
        while waiting:
            ready, waiting = ray.wait(waiting, timeout=_POLL_S if lost is None else _LAST_WORDS_S)
            if not ready and lost is not None:
                break
            for reference in ready:
                lost = _loss_of(reference) or lost
            shown = _show(actors[0], len(task.points), shown, advance)
        return lost
    except RayActorError as error:
        return _lost_by(error)
    finally:
        for actor in actors:
            ray.kill(actor)


def _loss_of(reference: Any) -> Exception | None:
    """How a worker was lost: it died, or cannot reach another one. Raises its own error."""
    try:
        get_result(reference)
    except RayActorError as error:
        return _lost_by(error)
    except RayTaskError as error:
        if isinstance(error.cause, LostPeerError):
            return error.cause
        if isinstance(error.cause, ImportError):
            raise ClusterError(cannot_import(str(error.cause))) from None
        raise
    return None


def _lost_by(error: RayActorError) -> RayActorError:
    if error.actor_init_failed:
        raise not_begun(error) from None
    return error


def _show(actor: Any, points: int, shown: float, advance: Any) -> float:
    """Tell the progress; how many points' worth were told."""
    try:
        done, total = ray.get(actor.progress.remote(), timeout=_POLL_S)
    except (RayActorError, GetTimeoutError):
        return shown
    now = max(points * done / total, shown) if total else shown
    advance(now - shown, (now - shown) * (total or 0) / points)
    return now
