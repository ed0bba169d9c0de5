"""Scorers that choose batches while a target trains: bounded look-ahead, any number of actors."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import ray

from stillhouse.actors.pool_worker import get_result
from stillhouse.actors.window_scorer import OnlineScorer
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.placement import actor_options
from stillhouse.training.online import Ask, ScoredWindow
from stillhouse.training.task import TrainTask

LOOK_AHEAD = 4
"""Windows that are scored before they are needed: a slow one among them stalls nobody."""


@contextmanager
def online_scorers(ctx: Context, task: TrainTask) -> Generator[tuple[list[Any], dict[str, float]]]:
    """The actors for as long as a training lasts, and the resources that all of them hold."""
    scorers = _start(ctx, task)
    each = actor_options(ctx.compute, ctx.compute.scorer)
    held = {"CPU": len(scorers) * each["num_cpus"], "GPU": len(scorers) * each["num_gpus"]}
    try:
        yield scorers, held
    finally:
        for scorer in scorers:
            ray.kill(scorer)


def _start(ctx: Context, task: TrainTask) -> list[Any]:
    """`compute.scorers` of them and at most one a lane; they load models at first use."""
    assert task.online is not None
    ctx.close_pool()
    count = min(ctx.compute.scorers, task.online.lanes)
    actor: Any = OnlineScorer
    options = actor_options(ctx.compute, ctx.compute.scorer)
    return [
        actor.options(**options).remote(task, rank, count, 2 * LOOK_AHEAD + 2)
        for rank in range(count)
    ]


def ask_ahead(scorers: Sequence[Any], num_windows: int) -> Ask:
    """Asks the scorers for windows before they are needed; made in each training worker."""
    waiting: dict[int, list[Any]] = {}

    def ask(number: int) -> list[ScoredWindow]:
        for ahead in range(number, min(number + LOOK_AHEAD + 1, num_windows)):
            if ahead not in waiting:
                waiting[ahead] = [scorer.window.remote(ahead) for scorer in scorers]
        return get_result(waiting.pop(number))

    return ask
