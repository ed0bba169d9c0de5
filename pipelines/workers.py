"""A group of training workers from the driver: started, listened to, begun again, given up."""

import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from stillhouse.actors.worker_group import (
    ENVIRONMENT,
    GroupSize,
    GroupState,
    Work,
    WorkerGroupActor,
)
from stillhouse.compute_settings import device_type
from stillhouse.errors import ClusterError, PartFailedError, StoreUnreachableError
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.pool import PREEMPTION_BUDGET, as_error
from stillhouse.spec import ComputeSettings

_POLL_S = 0.25
_WAIT_POLL_S = 2.0
_LEAVE_S = 60.0
STEP = "step"
"""News of this kind carry the number of the last `step` (of one `training` of several)."""


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


class Gang:
    """The workers of one torch process group, `compute.trainers` of them.

    They are started with the first work and are kept for the next: half of a small training is
    imports in fresh processes. Workers that are lost are replaced.

    Args:
        ctx: the run.
        beside: resources that other actors of the job hold meanwhile.
    """

    def __init__(self, ctx: Context, beside: Mapping[str, float] | None = None) -> None:
        self._ctx, self._beside = ctx, beside or {}
        self._size = group_size(ctx.compute)
        self._group: Any = None
        self._ended: Any = None
        self.failed_on: str | None = None
        """Address of the node on which a worker ended with an error."""

    def __enter__(self) -> "Gang":
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *_: object) -> None:
        self._terminate(gently=kind is None or issubclass(kind, Exception))

    def run(self, what: str, work: Work, hear: Callable[[str, dict[str, Any]], None]) -> None:
        """Call `work` in all workers, until it went through.

        After a loss it is called again in new ones: it has to go on from what it left in the store.
        Given up when `compute.max_attempts` groups were lost without a step more than before.

        Args:
            what: is trained, for errors.
            work: small and picklable, such as a `partial` of a function with plain values.
            hear: told what workers tell, in the driver.

        Raises:
            ClusterError: the cluster stayed too small. PartFailedError: workers kept dying.
            StillhouseError: what a worker raised.
        """
        reached: dict[str, int] = {}
        best, losses = -1, 0
        attempts = self._ctx.compute.max_attempts
        with room(self._ctx, self._size, what, self._beside):
            while True:
                lost = self._try(work, hear, reached)
                if lost is None:
                    return
                self._terminate(gently=True)
                losses = 1 if sum(reached.values()) > best else losses + 1
                if losses >= (attempts if self._size.alone else 2):  # Ray Train tried as often
                    raise PartFailedError(
                        f"{what} lost its workers {attempts} times without getting any further, "
                        f"at last by: {lost} (out of memory?): raise `compute.max_attempts`, or "
                        "lower `micro_batch`"
                    )
                best = sum(reached.values())

    def _try(
        self, work: Work, hear: Callable[[str, dict[str, Any]], None], reached: dict[str, int]
    ) -> str | None:
        """One group and its replacements: why it was given up; None where the work is done.

        `reached` has the furthest step of each training that was told of.
        """
        try:
            if self._group is None:
                self._ctx.close_pool()
                actor: Any = WorkerGroupActor
                environment = {"env_vars": ENVIRONMENT}
                self._group = actor.options(
                    max_concurrency=8, runtime_env=environment, **self._size.options
                ).remote()
                self._ended = self._group.fit.remote(self._size)
            ray.get(self._group.give.remote(work))
            while True:
                over = bool(ray.wait([self._ended], timeout=_POLL_S)[0])
                state: GroupState = ray.get(self._group.state.remote())
                for kind, content in state.news:
                    if kind == STEP:
                        name = content.get("training", "")
                        reached[name] = max(reached.get(name, 0), content["step"])
                    hear(kind, content)
                if state.error is not None:
                    kind, message, node = state.error
                    if kind == StoreUnreachableError.__name__:
                        return f"{kind}: {message}"  # as lost: it goes on from the store
                    self.failed_on = node
                    raise as_error(kind, message)
                if state.done:
                    return None
                if over:
                    return str(ray.get(self._ended))
        except (RayActorError, RayTaskError) as lost:
            lines = [line for line in str(lost).splitlines() if line.strip()]
            return lines[-1 if isinstance(lost, RayTaskError) else 0][:300]

    def _terminate(self, *, gently: bool = False) -> None:
        if self._group is not None:
            if gently:  # else Ray Train would keep its place until the job ends
                with suppress(RayError):
                    ray.get(self._group.close.remote())
                    ray.wait([self._ended], timeout=_LEAVE_S)
            ray.kill(self._group)
        self._group = self._ended = None


def run_workers(
    ctx: Context,
    what: str,
    work: Work,
    hear: Callable[[str, dict[str, Any]], None],
    beside: Mapping[str, float] | None = None,
) -> None:
    """Call `work` in a group of its own; see `Gang.run`."""
    with Gang(ctx, beside) as gang:
        gang.run(what, work, hear)


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
