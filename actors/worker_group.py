"""The worker group actor runs functions in all workers of one torch process group, in turn.

It hosts Ray Train's trainer: a worker that dies takes its group with it, and the function is
called again in a new one. A group of one needs no Ray Train, which takes four processes beside the
worker: it is this actor itself. Between two functions the workers wait, with all that they have
imported. When this actor goes, so do they. They tell it what happens; the driver asks for the news.
"""

import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError

from stillhouse.compute_settings import group_backend
from stillhouse.errors import DivergedError, StillhouseError
from stillhouse.training.task import Tell

Work = Callable[[Tell], None]
"""What each worker does, between starts of its process; torch's process group is there."""
ENVIRONMENT = {"RAY_CHDIR_TO_TRIAL_DIR": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
"""Paths stay what they are; an end is noticed soon."""
_POLL_S = 0.1
_TRANSIENT = (RuntimeError, OSError, RayError)
"""What the survivors of a lost worker see in torch's collectives; anything else is an error."""


@dataclass(frozen=True, slots=True)
class GroupSize:
    """How many workers, of what size; `min_workers` below `num_workers`: it may shrink to them."""

    num_workers: int
    min_workers: int
    cpus: float
    gpus: float
    threads: int
    device: str
    """`cpu` or `cuda`."""
    max_failures: int
    """Lost groups before it gives up; those on preempted nodes count apart."""
    max_preemptions: int
    accelerator: str | None = None
    """Ray's name of what the workers' nodes must have."""
    labels: dict[str, str] = field(default_factory=dict[str, str])
    """A selector of their labels."""

    @property
    def alone(self) -> bool:
        """Whether one worker is all."""
        return self.num_workers == 1

    @property
    def options(self) -> dict[str, Any]:
        """Ray's, of the actor of the group: nothing but where it is the worker."""
        if not self.alone:
            return {"num_cpus": 0}
        options: dict[str, Any] = {"num_gpus": self.gpus} if self.gpus else {"num_cpus": self.cpus}
        if self.accelerator is not None:
            options["accelerator_type"] = self.accelerator
        return options | ({"label_selector": self.labels} if self.labels else {})


class GroupError(NamedTuple):
    """The error that a worker ended with: its class, its message, and the address of its node."""

    kind: str
    message: str
    node: str


class GroupState(NamedTuple):
    """What a driver learns when it asks: the news since the last time, whether the work is done in
    all workers, and the first error.
    """

    news: list[tuple[str, dict[str, Any]]]
    done: bool
    error: GroupError | None


@ray.remote
class WorkerGroupActor:
    """One group of training workers, its work, its news and its first error."""

    def __init__(self) -> None:
        self._news: list[tuple[str, dict[str, Any]]] = []
        self._error: GroupError | None = None
        self._work: Work | None = None
        self._number = 0
        self._entered: set[int] = set()
        self._done: set[int] = set()
        self._size = 1
        self._closed = False

    def fit(self, size: GroupSize) -> str:
        """Keep workers up that do what is given, new ones where some were lost; until `close`.

        Returns:
            Why it gave up.
        """
        here: Any = ray.get_runtime_context().current_actor
        config: dict[str, Any] = {"group": here, "size": size}
        if size.alone:
            _enter(config)
            return "its worker ended"
        from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.torch import TorchConfig, TorchTrainer

        elastic = size.min_workers < size.num_workers
        with tempfile.TemporaryDirectory() as folder:
            trainer = TorchTrainer(
                _enter,
                train_loop_config=config,
                torch_config=TorchConfig(backend=group_backend(size.device, size.gpus)),
                scaling_config=ScalingConfig(
                    num_workers=(size.min_workers, size.num_workers)
                    if elastic
                    else size.num_workers,
                    use_gpu=size.gpus > 0,
                    resources_per_worker={"GPU": size.gpus} if size.gpus else {"CPU": size.cpus},
                    accelerator_type=size.accelerator,
                    label_selector=size.labels or None,
                ),
                run_config=RunConfig(
                    name="group",
                    storage_path=folder,
                    failure_config=FailureConfig(
                        max_failures=size.max_failures,
                        max_preemption_failures=size.max_preemptions,
                    ),
                ),
            )
            try:
                trainer.fit()
            except TrainingFailedError as error:
                return _first_line(error)
        return "its workers ended"

    def give(self, work: Work) -> None:
        """The next function to call in all workers."""
        self._work, self._number, self._done = work, self._number + 1, set()

    def enter(self, rank: int, size: int) -> None:
        """A worker begins; one that does so again belongs to a new group, which starts over."""
        if rank in self._entered:
            self._entered, self._done = set(), set()
        self._entered.add(rank)
        self._size = size

    def close(self) -> None:
        """There is no more work."""
        self._closed = True

    def next(self, after: int) -> tuple[int, Work] | None:
        """Work with a higher number, which is not done; None: wait; number -1: leave."""
        if self._closed:
            return -1, _nothing
        if self._work is None or self._number <= after or self._is_done():
            return None
        return self._number, self._work

    def finished(self, rank: int) -> None:
        """A worker has done its work."""
        self._done.add(rank)

    def _is_done(self) -> bool:
        return len(self._done) == self._size

    def tell(self, kind: str, content: dict[str, Any]) -> None:
        """Keep what a worker says."""
        self._news.append((kind, content))

    def state(self) -> GroupState:
        """See `GroupState`."""
        said, self._news = self._news, []
        return GroupState(said, self._is_done(), self._error)

    def fail(self, error: GroupError) -> None:
        """Keep the error that ends it all; the first one counts."""
        self._error = self._error or error
        self._closed = True


def _enter(config: dict[str, Any]) -> None:
    """In each worker: do what is given, until the group is terminated.

    An error that a new try would meet again is kept, and ends the group. Where all workers raise
    it together they leave; else the group is torn down, and a new one leaves at once.
    """
    import torch
    from torch import distributed

    group, size = config["group"], config["size"]
    torch.set_num_threads(size.threads)
    number = 0
    try:
        _take_device(size)
        rank = 0 if size.alone else distributed.get_rank()
        ray.get(group.enter.remote(rank, 1 if size.alone else distributed.get_world_size()))
        if not size.alone:
            distributed.barrier()
        while True:
            given: Any = ray.get(group.next.remote(number))
            if given is None:
                time.sleep(_POLL_S)
                continue
            number, work = given
            if number < 0:
                return
            work(partial(_tell, group))
            ray.get(group.finished.remote(rank))
    except Exception as error:
        out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if isinstance(error, _TRANSIENT) and not out_of_memory:
            raise
        node = ray.util.get_node_ip_address()
        ray.get(group.fail.remote(GroupError(type(error).__name__, _message(error), node)))
        if not (isinstance(error, DivergedError) or size.alone):
            raise  # others may wait for this one: their group is torn down


def _take_device(size: GroupSize) -> None:
    """Let torch's current GPU be this worker's: Ray Train shows it those of its neighbours too.

    Raises:
        SpecError: there is none.
    """
    import torch
    from ray.train.torch import get_device

    from stillhouse.models.device import choose_device

    if choose_device(size.device, size.gpus).type == "cuda" and size.gpus and not size.alone:
        torch.cuda.set_device(get_device())


def _nothing(_: Tell) -> None:
    """No work."""


def _tell(group: Any, kind: str, content: dict[str, Any]) -> None:
    group.tell.remote(kind, content)


def _message(error: Exception) -> str:
    """What the driver says: of an error of our own its message, else where it came from too."""
    if isinstance(error, StillhouseError):
        return str(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    said = "; ".join([str(error), *getattr(error, "__notes__", [])])
    return f"{type(error).__name__}: {said} ({last.filename}:{last.lineno})"


def _first_line(error: Exception) -> str:
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    reasons = [str(failure).strip().splitlines() for failure in failures.values()]
    lines = [line for reason in reasons for line in reason[-1:]] or [str(error)]
    return lines[0][:300]
