"""The trainer actor trains one model at a time and keeps it in the store."""

import ray

from stillhouse.storage.artifact import Manifest, Store
from stillhouse.training.task import ModelTask


@ray.remote
class TrainerActor:
    """Trains models; `progress` may be asked while `train` runs."""

    def __init__(self, store: Store, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._store = store
        self._progress = (0, 0)

    def train(self, task: ModelTask) -> Manifest:
        """Train the model of a task.

        Raises:
            DivergedError: the loss became NaN or infinite.
        """
        from stillhouse.training.job import run_training

        self._progress = (0, 0)
        return run_training(self._store, task, self._note)

    def progress(self) -> tuple[int, int]:
        """Steps done, and steps in all."""
        return self._progress

    def node(self) -> str:
        """The address of the node that this runs on."""
        return ray.util.get_node_ip_address()

    def _note(self, step: int, num_steps: int) -> None:
        self._progress = (step, num_steps)
