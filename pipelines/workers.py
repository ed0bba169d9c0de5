"""A group of training workers from the driver: started, listened to, begun again, given up."""

import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from stillhouse.actors.attempts import PREEMPTION_BUDGET
from stillhouse.actors.worker_group import ENVIRONMENT, GroupSize, Work, WorkerGroupActor
from stillhouse.compute_settings import device_type
from stillhouse.errors import ClusterError, PartFailedError, StoreUnreachableError
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.flow import as_error
from stillhouse.spec import ComputeSettings

_POLL_S = 0.25
_WAIT_POLL_S = 2.0
STEP = "step"
"""News of this kind carry the number of the last `step`: how far the work is."""


def group_size(compute: ComputeSettings) -> GroupSize:
    """The group that a spec asks for."""
    gpus = compute.gpus_of(compute.trainer)
    return GroupSize(
        num_workers=compute.trainers,
        min_workers=compute.min_trainers or compute.trainers,
        cpus=compute.cpus_per_worker,
        gpus=gpus,
        device=device_type(compute.device, gpus),
        accelerator=compute.trainer.accelerator,
        labels=compute.trainer.labels,
        threads=compute.threads_per_worker,
        max_failures=compute.max_attempts - 1,
        max_preemptions=PREEMPTION_BUDGET,
    )


def run_workers(
    ctx: Context,
    what: str,
    work: Work,
    hear: Callable[[str, dict[str, Any]], None],
    beside: Mapping[str, float] | None = None,
) -> None:
    """Call `work` in `compute.trainers` workers of one torch process group, until it went through.

    Workers that are lost are replaced, and `work` is called again in all of them: it has to go on
    from what it left in the store. It gives up when `compute.max_attempts` groups were lost
    without a step more than before.

    Args:
        ctx: the run.
        what: is trained, for errors.
        work: small and picklable, such as a `partial` of a function with plain values.
        hear: told what workers tell, in the driver.
        beside: resources that other actors of the job hold meanwhile.

    Raises:
        ClusterError: the cluster stayed too small. PartFailedError: workers kept dying.
        StillhouseError: what a worker raised.
    """
    size = group_size(ctx.compute)
    best = -1
    ctx.close_pool()
    with room(ctx, size, what, beside):
        while True:
            lost, reached = _try(work, size, hear)
            if lost is None:
                return
            if reached <= best:
                raise PartFailedError(
                    f"{what} lost its workers {ctx.compute.max_attempts} times without getting any "
                    f"further, at last by: {lost} (out of memory?): raise `compute.max_attempts`, "
                    "or lower `micro_batch`"
                )
            best = reached


def _try(
    work: Work, size: GroupSize, hear: Callable[[str, dict[str, Any]], None]
) -> tuple[str | None, int]:
    """One group and its replacements: why it was given up (None: done), and the step it reached."""
    reached = 0
    actor: Any = WorkerGroupActor
    environment = {"env_vars": ENVIRONMENT}
    group = actor.options(num_cpus=0, max_concurrency=8, runtime_env=environment).remote()
    try:
        done = group.fit.remote(work, size)
        over = False
        while not over:
            over = bool(ray.wait([done], timeout=_POLL_S)[0])
            for kind, content in ray.get(group.news.remote()):
                reached = max(reached, content["step"]) if kind == STEP else reached
                hear(kind, content)
        lost: Any = ray.get(done)
        error: Any = ray.get(group.error.remote())
    except RayActorError as lost_actor:
        return str(lost_actor).splitlines()[0], reached
    finally:
        ray.kill(group)
    if error is not None and error[0] == StoreUnreachableError.__name__:
        return f"{error[0]}: {error[1]}", reached  # as lost: it goes on from what is in the store
    if error is not None:
        raise as_error(*error)
    return lost, reached


@contextmanager
def room(
    ctx: Context,
    size: GroupSize,
    what: str,
    beside: Mapping[str, float] | None = None,
    setting: str = "compute.trainers",
) -> Generator[None]:
    """Wait until the cluster is large enough, saying what is missing, and ask for more nodes.

    The autoscaler is asked until this ends, however it ends: its nodes may go then.

    Args:
        ctx: the run.
        size: the group; it may begin with `min_workers`.
        what: is trained, for errors.
        beside: resources that other actors of the job hold meanwhile.
        setting: to lower.

    Raises:
        ClusterError: it is too small after `compute.wait_s`.
    """
    started, asked = time.monotonic(), False
    try:
        while (lacks := _missing(size, beside or {})) is not None:
            missing = f"{what} {lacks}: add nodes, or lower `{setting}`"
            if time.monotonic() - started > ctx.compute.wait_s:
                raise ClusterError(missing)
            if not asked:
                asked = True
                _ask_for(size)
                ctx.listener.note("waiting", {"message": missing})
            time.sleep(_WAIT_POLL_S)
        yield
    finally:
        if asked:
            with suppress(RayError, RuntimeError):  # a cluster that is gone keeps no nodes up
                ray.autoscaler.sdk.request_resources(bundles=[])


def _missing(size: GroupSize, beside: Mapping[str, float]) -> str | None:
    """What the cluster has too little of; None where it is large enough."""
    kind, each = _need(size)
    needs = {kind: size.min_workers * each} | {k: n for k, n in beside.items() if k != kind and n}
    needs[kind] += beside.get(kind, 0)
    resources = ray.cluster_resources()
    for name, needed in needs.items():
        there = resources.get(name, 0)
        if there < needed:
            scorers = ", scorers included" if beside.get(name) else ""
            return (
                f"needs {needed:g} {name}s for {size.min_workers} workers{scorers}, the cluster "
                f"has {there:g}"
            )
    return None


def _need(size: GroupSize) -> tuple[str, float]:
    return ("GPU", size.gpus) if size.gpus else ("CPU", size.cpus)


def _ask_for(size: GroupSize) -> None:
    """Ask the autoscaler for nodes of all workers."""
    bundle = dict([_need(size)])
    if size.accelerator is not None:
        bundle[f"accelerator_type:{size.accelerator}"] = 0.001
    count = size.num_workers
    labels = [size.labels] * count if size.labels else None
    ray.autoscaler.sdk.request_resources(bundles=[bundle] * count, bundle_label_selectors=labels)
