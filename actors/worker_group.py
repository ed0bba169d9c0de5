"""The worker group actor runs one function in all workers of a training, until it went through.

It hosts Ray Train's trainer: a worker that dies takes its group with it, and the function is
called again in a new one. When this actor goes, so do the workers. Workers tell it what happens;
the driver asks for the news.
"""

import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError

from stillhouse.compute_settings import group_backend
from stillhouse.errors import DivergedError, StillhouseError
from stillhouse.training.task import Tell

Work = Callable[[Tell], None]
"""What each worker does, between starts of its process; torch's process group is there."""
ENVIRONMENT = {"RAY_CHDIR_TO_TRIAL_DIR": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
"""Paths stay what they are; an end is noticed soon."""
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


@ray.remote
class WorkerGroupActor:
    """One group of training workers, its news and its first error."""

    def __init__(self) -> None:
        self._news: list[tuple[str, dict[str, Any]]] = []
        self._error: tuple[str, str] | None = None

    def fit(self, work: Work, size: GroupSize) -> str | None:
        """Call `work` in all workers, and again in new ones where some were lost.

        Returns:
            None where it went through or `error` tells more; else why the workers were lost.
        """
        from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.torch import TorchConfig, TorchTrainer

        elastic = size.min_workers < size.num_workers
        here: Any = ray.get_runtime_context().current_actor
        with tempfile.TemporaryDirectory() as folder:
            trainer = TorchTrainer(
                _enter,
                train_loop_config={"work": work, "group": here, "size": size},
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
        return None

    def tell(self, kind: str, content: dict[str, Any]) -> None:
        """Keep what a worker says."""
        self._news.append((kind, content))

    def news(self) -> list[tuple[str, dict[str, Any]]]:
        """What was said since this was last asked."""
        said, self._news = self._news, []
        return said

    def fail(self, name: str, message: str) -> None:
        """Keep the error that ends it all; the first one counts."""
        self._error = self._error or (name, message)

    def error(self) -> tuple[str, str] | None:
        """Class and message of the error that a worker ended with."""
        return self._error


def _enter(config: dict[str, Any]) -> None:
    """In each worker: nothing where another one ended with an error, else the work.

    An error that a new try would meet again is kept, and ends the group. Where all workers raise
    it together they leave in peace; else the group is torn down, for others wait for this one.
    """
    import torch

    group: Any = config["group"]
    ended: Any = ray.get(group.error.remote())
    if ended is not None:
        return
    size: GroupSize = config["size"]
    torch.set_num_threads(size.threads)
    try:
        _take_device(size)
        config["work"](partial(_tell, group))
    except Exception as error:
        out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if isinstance(error, _TRANSIENT) and not out_of_memory:
            raise
        ray.get(group.fail.remote(type(error).__name__, _message(error)))
        if not (isinstance(error, DivergedError) or torch.distributed.get_world_size() == 1):
            raise


def _take_device(size: GroupSize) -> None:
    """Let torch's current GPU be this worker's: Ray Train shows it those of its neighbours too.

    Raises:
        SpecError: there is none.
    """
    import torch
    from ray.train.torch import get_device

    from stillhouse.models.device import choose_device

    if choose_device(size.device, size.gpus).type == "cuda" and size.gpus:
        torch.cuda.set_device(get_device())


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
