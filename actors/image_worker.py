"""The pool workers of a distillation: experts, teachers, units and evaluations, one task at a time.

Each hosts the prepared images of the job and calls the library on them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stillhouse.distillation.spec import NetworkSettings
from stillhouse.storage.artifact import Receipt, Store


@dataclass(frozen=True, slots=True)
class ImageWork:
    """What a worker is made from: small plain values.

    `teachers` are networks with the fingerprints of their weights, for the decoupled methods.
    """

    images: str
    zca: bool
    device: str
    gpus: float
    threads: int
    teachers: tuple[tuple[NetworkSettings, str], ...] = ()


class ImageHost:
    """Hosts the prepared images; `function` is the library's for one kind of task."""

    def __init__(
        self,
        store: Store,
        work: ImageWork,
        function: Callable[..., Receipt],
    ) -> None:
        import torch

        from stillhouse.distillation.expert_job import load_teacher
        from stillhouse.distillation.prepared import prepare

        torch.set_num_threads(work.threads)
        self._store, self._function = store, function
        self._given: list[Any] = [
            prepare(store, work.images, zca=work.zca, device=work.device, gpus=work.gpus)
        ]
        if work.teachers:
            self._given.append([load_teacher(store, self._given[0], *one) for one in work.teachers])

    def run(self, task: Any) -> Receipt:
        """Do one task."""
        return self._function(self._store, *self._given, task)

    def prefetch(self, task: Any) -> None:
        """Nothing: what a task reads is small."""


class SourceHost:
    """Reads, checks and splits a source of images: one task, of `stored_images`."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def run(self, task: Any) -> Receipt:
        """Commit the images artifact."""
        from stillhouse.distillation.stored_images import run_source

        return run_source(self._store, task)

    def prefetch(self, task: Any) -> None:
        """Nothing."""
