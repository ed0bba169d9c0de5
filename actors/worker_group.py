"""An actor that runs functions in all workers of one torch process group, one after another.

It hosts Ray Train's trainer: when a worker dies, its group is replaced, and the function is called
again in the new one. A group of one needs no Ray Train, which takes four processes beside the
worker: the actor itself is the worker. Between functions the workers wait, with everything
imported. They send events to the actor, which the driver polls. When the actor ends, so do they.
"""

import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError

from stillhouse.compute_settings import ComputeSettings, device_type, group_backend
from stillhouse.errors import DivergedError, StillhouseError
from stillhouse.training.task import Tell

Work = Callable[[Tell], None]
"""What each worker does; torch's process group is initialised."""
ENVIRONMENT = {"RAY_CHDIR_TO_TRIAL_DIR": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
"""Keep the working directory; notice the end of a group soon."""
_POLL_S = 0.1
_TRANSIENT = (RuntimeError, OSError, RayError)
"""What the other workers of a lost one raise in torch's collectives; anything else is an error."""


class GroupError(NamedTuple):
    """The error that a worker ended with: its class, its message, and the address of its node."""

    kind: str
    message: str
    node: str


class GroupState(NamedTuple):
    """The events since the last time, whether all workers are done, and the first error."""

    events: list[tuple[str, dict[str, Any]]]
    done: bool
    error: GroupError | None


@ray.remote
class WorkerGroupActor:
    """One group of `compute.trainers` workers: its work, its events and its first error."""

    def __init__(self, compute: ComputeSettings, max_preemptions: int) -> None:
        self._compute, self._max_preemptions = compute, max_preemptions
        self._events: list[tuple[str, dict[str, Any]]] = []
        self._error: GroupError | None = None
        self._work: Work | None = None
        self._number = 0
        self._entered: set[int] = set()
        self._done: set[int] = set()
        self._size = 1
        self._closed = False

    def fit(self) -> str:
        """Run the workers, and new groups where some are lost, until `close`.

        Returns:
            Why it ended.
        """
        compute, here = self._compute, ray.get_runtime_context().current_actor
        config: dict[str, Any] = {"group": here, "compute": compute}
        if compute.trainers == 1:
            _enter(config)
            return "its worker ended"
        from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.torch import TorchConfig, TorchTrainer

        count, least, gpus = compute.trainers, compute.min_trainers, compute.trainer_gpus
        device = device_type(compute.device, gpus)
        with tempfile.TemporaryDirectory() as folder:
            trainer = TorchTrainer(
                _enter,
                train_loop_config=config,
                torch_config=TorchConfig(backend=group_backend(device, gpus)),
                scaling_config=ScalingConfig(
                    num_workers=(least, count) if least and least < count else count,
                    use_gpu=gpus > 0,
                    resources_per_worker=compute.needed_by_trainer,
                    accelerator_type=compute.trainer.accelerator,
                    label_selector=compute.trainer.labels or None,
                ),
                run_config=RunConfig(
                    name="group",
                    storage_path=folder,
                    failure_config=FailureConfig(
                        max_failures=compute.max_attempts - 1,
                        max_preemption_failures=self._max_preemptions,
                    ),
                ),
            )
            try:
                trainer.fit()
            except TrainingFailedError as error:
                failures: dict[int, Exception] = getattr(error, "worker_failures", {})
                reasons = [str(failure).strip().splitlines() for failure in failures.values()]
                lines = [reason[-1] for reason in reasons if reason] or [str(error)]
                return lines[0][:300]
        return "its workers ended"

    def give(self, work: Work) -> None:
        """Set the next function to call in all workers."""
        self._work, self._number, self._done = work, self._number + 1, set()

    def enter(self, rank: int, size: int) -> None:
        """Register a worker; a rank that registers again is of a new group, which starts over."""
        if rank in self._entered:
            self._entered, self._done = set(), set()
        self._entered.add(rank)
        self._size = size

    def close(self) -> None:
        """Let the workers end."""
        self._closed = True

    def next(self, after: int) -> tuple[int, Work | None] | None:
        """Number and function of unfinished work after number `after`; None: wait; -1: end."""
        if self._closed:
            return -1, None
        if self._work is None or self._number <= after or self._is_done():
            return None
        return self._number, self._work

    def finished(self, rank: int) -> None:
        """Note that a worker has done its work."""
        self._done.add(rank)

    def _is_done(self) -> bool:
        return len(self._done) == self._size

    def tell(self, kind: str, content: dict[str, Any]) -> bool:
        """Keep a worker's event for the driver; whether the worker is to end."""
        self._events.append((kind, content))
        return self._closed

    def state(self) -> GroupState:
        """See `GroupState`."""
        events, self._events = self._events, []
        return GroupState(events, self._is_done(), self._error)

    def fail(self, error: GroupError) -> None:
        """Keep the first error and let the workers end."""
        self._error = self._error or error
        self._closed = True


def _enter(config: dict[str, Any]) -> None:
    """In each worker: call the functions that are given, until the group is closed.

    An error that another attempt would meet again is kept, and ends the group. If all workers raise
    it together they return; else the group is torn down, and the workers of a new one end at once.
    """
    import torch
    from torch import distributed

    group, compute = config["group"], config["compute"]
    alone = compute.trainers == 1
    torch.set_num_threads(compute.threads_per_worker)
    try:
        _choose_gpu(compute, alone)
        rank = 0 if alone else distributed.get_rank()
        ray.get(group.enter.remote(rank, 1 if alone else distributed.get_world_size()))
        if not alone:
            distributed.barrier()
        number = 0
        while True:
            given: Any = ray.get(group.next.remote(number))
            if given is None:
                time.sleep(_POLL_S)
                continue
            number, work = given
            if work is None:
                return
            work(partial(_tell, group))
            ray.get(group.finished.remote(rank))
    except _Closed:
        if not alone:
            raise  # the others wait for this worker
    except Exception as error:
        out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if isinstance(error, _TRANSIENT) and not out_of_memory:
            raise
        node = ray.util.get_node_ip_address()
        ray.get(group.fail.remote(GroupError(type(error).__name__, _message(error), node)))
        if not (isinstance(error, DivergedError) or alone):
            raise  # others may wait for this worker: tear their group down


def _choose_gpu(compute: ComputeSettings, alone: bool) -> None:
    """Make this worker's GPU torch's current one: Ray Train shows it its neighbours' GPUs too.

    Raises:
        SpecError: there is none.
    """
    import torch

    from stillhouse.models.device import choose_device

    gpus = compute.trainer_gpus
    if choose_device(compute.device, gpus).type == "cuda" and gpus and not alone:
        from ray.train.torch import get_device  # half a second of imports

        torch.cuda.set_device(get_device())


def _tell(group: Any, kind: str, content: dict[str, Any]) -> None:
    closed = ray.get(group.tell.remote(kind, content))
    if closed and kind != "failed":
        raise _Closed


class _Closed(Exception):
    """In a worker: the group was closed while it works."""


def _message(error: Exception) -> str:
    """The message for the driver: of an unexpected error with its class and place."""
    if isinstance(error, StillhouseError):
        return str(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = "; ".join([str(error), *getattr(error, "__notes__", [])])
    return f"{type(error).__name__}: {text} ({last.filename}:{last.lineno})"
