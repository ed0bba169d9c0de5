"""The Distiller actor learns a synthetic set; several share every batch of it."""

from datetime import timedelta

import ray

from stillhouse.actors.image_worker import ImageWork
from stillhouse.compute_settings import group_backend
from stillhouse.storage.artifact import Store

_PATIENCE = timedelta(minutes=30)


@ray.remote
class Distiller:
    """One worker of a distillation; `progress` may be asked while `run` runs."""

    def __init__(self, store: Store, work: ImageWork) -> None:
        import torch

        torch.set_num_threads(work.threads)
        self._store, self._work = store, work
        self._progress = (0, 0)

    def address(self) -> str:
        """Where the others can meet this one: a free port of its node."""
        import socket

        with socket.socket() as free:
            free.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def run(self, task: object, rank: int, size: int, address: str) -> None:
        """Distil to the end, or go on from the newest checkpoint.

        Raises:
            DivergedError: the matching loss is not finite before anything was learned.
        """
        import torch.distributed as dist

        from stillhouse.distillation.matching_job import MatchingTask, run_matching
        from stillhouse.training.group import WorkerGroup

        assert isinstance(task, MatchingTask)
        prepared = self._work.prepare(self._store)
        if size == 1:
            run_matching(self._store, prepared, task, self._note)
            return
        backend = group_backend(prepared.device.type, self._work.gpus)
        dist.init_process_group(
            backend, init_method=address, rank=rank, world_size=size, timeout=_PATIENCE
        )
        try:
            run_matching(self._store, prepared, task, self._note, WorkerGroup.current())
        finally:
            dist.destroy_process_group()

    def progress(self) -> tuple[int, int]:
        """Iterations done, and in all."""
        return self._progress

    def _note(self, done: int, total: int) -> None:
        self._progress = (done, total)
