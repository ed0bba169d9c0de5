"""What the crew of a distillation hosts: the prepared images of the job, and the teachers.

Every step of the job is calls of library functions on them; one worker serves all steps.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

from stillhouse.distillation.spec import NetworkSettings
from stillhouse.storage.artifact import Receipt, Store

Teachers = tuple[tuple[NetworkSettings, str], ...]
"""Networks with the fingerprints of their weights."""


@dataclass(frozen=True, slots=True)
class ImageWork:
    """What a worker is made from: small plain values. `networks` are the job's, by key."""

    images: str
    zca: bool
    device: str
    gpus: float
    threads: int
    networks: dict[str, NetworkSettings] = field(default_factory=dict[str, NetworkSettings])

    def prepare(self, store: Store) -> Any:
        """The job's images on the worker's device: a `Prepared`.

        Raises:
            ModelError: one of the job's networks cannot be built for them.
        """
        from stillhouse.distillation.prepared import check_networks, prepare

        made = prepare(store, self.images, zca=self.zca, device=self.device, gpus=self.gpus)
        check_networks(self.networks, made.shape, made.num_classes)
        return made


@dataclass(frozen=True, slots=True)
class ImageCall:
    """A task for a worker.

    Attributes:
        function: the library's: (store, prepared images, teachers where there are any, task).
        task: its last argument.
        teachers: of the decoupled methods.
        prepared: off for what comes before the images are there.
    """

    function: Callable[..., Receipt]
    task: Any
    teachers: Teachers = ()
    prepared: bool = True

    @property
    def fingerprint(self) -> str:
        """The task's."""
        return self.task.fingerprint


class ImageHost:
    """Hosts prepared images and teachers; each is loaded with the first task that needs it."""

    def __init__(self, store: Store, work: ImageWork) -> None:
        import torch

        torch.set_num_threads(work.threads)
        self._store = store
        self._prepared = cache(partial(work.prepare, store))
        self._teachers: dict[tuple[str, ...], list[Any]] = {}

    def run(self, call: ImageCall) -> Receipt:
        """Do one task."""
        given: list[Any] = [self._prepared()] if call.prepared else []
        if call.teachers:
            given.append(self._load(call.teachers))
        return call.function(self._store, *given, call.task)

    def prefetch(self, call: ImageCall) -> None:
        """Nothing: what a task reads is small."""

    def _load(self, teachers: Teachers) -> list[Any]:
        from stillhouse.distillation.expert_job import load_teacher

        names = tuple(name for _, name in teachers)
        if names not in self._teachers:
            given = self._prepared()
            self._teachers[names] = [load_teacher(self._store, given, *one) for one in teachers]
        return self._teachers[names]
