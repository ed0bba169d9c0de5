"""A group of training workers from the driver: started, followed, replaced, given up."""

import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from stillhouse.actors.worker_group import ENVIRONMENT, GroupState, Work, WorkerGroupActor
from stillhouse.compute_settings import ComputeSettings
from stillhouse.errors import ClusterError, PartFailedError, StoreUnreachableError
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.placement import actor_options
from stillhouse.pipelines.pool import PREEMPTION_BUDGET, as_error

_POLL_S = 0.25
_WAIT_POLL_S = 2.0
_CLOSE_S = 60.0
STEP = "step"
"""Events of this kind have the number of the last `step` (of one `training` of several)."""
OnEvent = Callable[[str, dict[str, Any]], None]
"""Called in the driver with each event of the workers: its kind and content."""


class Gang:
    """The workers of one torch process group, `compute.trainers` of them.

    They are started with the first work and kept for the next: half of a small training is imports
    in fresh processes. Workers that are lost are replaced.

    Args:
        beside: resources that other actors of the job hold meanwhile.
        setting: the key to lower if the cluster is too small.

    Attributes:
        failed_on: address of the node on which a worker ended with an error.
    """

    def __init__(
        self,
        ctx: Context,
        beside: Mapping[str, float] | None = None,
        setting: str = "compute.trainers",
    ) -> None:
        self._ctx, self._beside, self._setting = ctx, beside or {}, setting
        self._group: Any = None
        self._ended: Any = None
        self.failed_on: str | None = None

    def __enter__(self) -> "Gang":
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *_: object) -> None:
        self._terminate(gently=kind is None or issubclass(kind, Exception))

    def run(self, what: str, work: Work, on_event: OnEvent) -> None:
        """Call `work` in all workers, until it succeeds.

        After a loss it is called again in new ones, and has to continue from what it left in the
        store. Given up when `compute.max_attempts` groups were lost without getting any further.

        Args:
            what: is trained, for errors.
            work: small and picklable, such as a `partial` of a function with plain values.

        Raises:
            ClusterError: the cluster stayed too small. PartFailedError: workers kept dying.
            StillhouseError: what a worker raised.
        """
        reached: dict[str, int] = {}
        best, losses = -1, 0
        compute = self._ctx.compute
        # Ray Train has made all attempts of a group itself, and is started once more
        attempts = compute.max_attempts if compute.trainers == 1 else 2
        with room(self._ctx, what, self._beside, self._setting):
            while (lost := self._try(work, on_event, reached)) is not None:
                self._terminate(gently=True)
                losses = 1 if sum(reached.values()) > best else losses + 1
                if losses >= attempts:
                    raise PartFailedError(
                        f"{what} lost its workers {compute.max_attempts} times without getting any "
                        f"further, at last by: {lost} (out of memory?): raise "
                        "`compute.max_attempts`, or lower `micro_batch`"
                    )
                best = sum(reached.values())

    def _try(self, work: Work, on_event: OnEvent, reached: dict[str, int]) -> str | None:
        """Run one group and its replacements: why it was lost; None if the work is done.

        Updates `reached`, the furthest step of each training.
        """
        try:
            if self._group is None:
                self._ctx.close_pool()
                compute, actor = self._ctx.compute, WorkerGroupActor
                options = {"num_cpus": 0.0}
                if compute.trainers == 1:  # the actor is the worker
                    options = actor_options(compute, compute.trainer)
                options |= {"max_concurrency": 8, "runtime_env": {"env_vars": ENVIRONMENT}}
                self._group = actor.options(**options).remote(compute, PREEMPTION_BUDGET)
                self._ended = self._group.fit.remote()
            ray.get(self._group.give.remote(work))
            while True:
                over = bool(ray.wait([self._ended], timeout=_POLL_S)[0])
                state: GroupState = ray.get(self._group.state.remote())
                for kind, content in state.events:
                    if kind == STEP:
                        name = content.get("training", "")
                        reached[name] = max(reached.get(name, 0), content["step"])
                    on_event(kind, content)
                if state.error is not None:
                    kind, message, node = state.error
                    if kind == StoreUnreachableError.__name__:
                        return f"{kind}: {message}"  # try again from the store
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
            if gently:  # else Ray Train would keep its placement group until the job ends
                with suppress(RayError):
                    ray.get(self._group.close.remote())
                    ray.wait([self._ended], timeout=_CLOSE_S)
            ray.kill(self._group)
        self._group = self._ended = None


def run_workers(
    ctx: Context, what: str, work: Work, on_event: OnEvent, setting: str = "compute.trainers"
) -> None:
    """Call `work` in a group that is started for it; see `Gang.run`."""
    with Gang(ctx, setting=setting) as gang:
        gang.run(what, work, on_event)


@contextmanager
def room(ctx: Context, what: str, beside: Mapping[str, float], setting: str) -> Generator[None]:
    """Wait until the cluster is large enough for a group, and ask the autoscaler for nodes.

    The request to the autoscaler ends with this context: its nodes may go then.

    Raises:
        ClusterError: the cluster is too small after `compute.wait_s`.
    """
    started, asked = time.monotonic(), False
    try:
        while (lacks := _missing(ctx.compute, beside)) is not None:
            missing = f"{what} {lacks}: add nodes, or lower `{setting}`"
            if time.monotonic() - started > ctx.compute.wait_s:
                raise ClusterError(missing)
            if not asked:
                asked = True
                _request_nodes(ctx.compute)
                ctx.listener.note("waiting", {"message": missing})
            time.sleep(_WAIT_POLL_S)
        yield
    finally:
        if asked:
            with suppress(RayError, RuntimeError):  # the cluster may be gone
                ray.autoscaler.sdk.request_resources(bundles=[])


def _missing(compute: ComputeSettings, beside: Mapping[str, float]) -> str | None:
    """What the cluster has too little of, or None."""
    workers = compute.min_trainers or compute.trainers
    [(kind, each)] = compute.needed_by_trainer.items()
    needs = {kind: workers * each + beside.get(kind, 0)}
    needs |= {name: count for name, count in beside.items() if name != kind and count}
    resources = ray.cluster_resources()
    for name, needed in needs.items():
        available = resources.get(name, 0)
        if available < needed:
            scorers = ", scorers included" if beside.get(name) else ""
            return (
                f"needs {needed:g} {name}s for {workers} workers{scorers}, the cluster "
                f"has {available:g}"
            )
    return None


def _request_nodes(compute: ComputeSettings) -> None:
    bundle = compute.needed_by_trainer
    if compute.trainer.accelerator is not None:
        bundle[f"accelerator_type:{compute.trainer.accelerator}"] = 0.001
    count, labels = compute.trainers, compute.trainer.labels
    selectors = [labels] * count if labels else None
    ray.autoscaler.sdk.request_resources(bundles=[bundle] * count, bundle_label_selectors=selectors)
