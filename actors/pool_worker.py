"""The worker of a pool: does one task while it reads for the next and writes the last.

It keeps one host, such as a model on its device, from task to task and from step to step. A task
carries names and URIs, never data: the worker reads and writes the store.
"""

import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from time import perf_counter
from typing import Any, Protocol

import ray

from stillhouse.errors import StillhouseError, StoreUnreachableError
from stillhouse.storage.artifact import Store
from stillhouse.storage.task import Task, commit


class HostSettings(Protocol):
    """What a host is built from: small plain values that can be compared."""

    def build(self, store: Store) -> Any:
        """Build it, in the worker."""
        ...


@dataclass(frozen=True, slots=True)
class FailedCall:
    """Why something could not be done: the error's class and message, and the node's address."""

    kind: str
    message: str
    node: str

    @property
    def elsewhere(self) -> bool:
        """Whether another node, or a later time, may do better."""
        return self.kind == StoreUnreachableError.__name__


@dataclass(frozen=True, slots=True)
class Done:
    """What a worker says of one thing it did.

    Attributes:
        value: the result, or a `FailedCall`.
        seconds: that the worker worked.
        waited_s: that it waited for data before.
    """

    value: Any
    seconds: float = 0.0
    waited_s: float = 0.0


@ray.remote
class PoolWorker:
    """Does tasks. Two are called at a time: one works while the other reads or writes.

    Ray neither restarts a lost worker nor repeats its calls: the pool does both, and knows which
    of them was the task's fault.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._working = Lock()
        self._free_since = 0.0
        self._settings: HostSettings | None = None
        self._host: Any = None

    def node(self) -> str:
        """The id of the node that it runs on; answers once it runs."""
        return ray.get_runtime_context().get_node_id()

    def do(self, task: Task, settings: HostSettings | None, again: bool) -> Done:
        """Do a task, unless it was finished before (`again`: somebody began it)."""
        try:
            return self._do(task, settings, again)
        except Exception as error:
            return Done(_failure(error))

    def call(self, function: Callable[[Any], Any], item: Any) -> Done:
        """`function(item)`."""
        started = perf_counter()
        try:
            return Done(function(item), perf_counter() - started)
        except Exception as error:
            return Done(_failure(error))

    def _do(self, task: Task, settings: HostSettings | None, again: bool) -> Done:
        done = self._store.finished(task.KIND, [task.fingerprint]) if again else {}
        if done:
            return Done(done[task.fingerprint])
        called, receipt = perf_counter(), None
        loaded = task.load(self._store)
        with self._working:
            begun = perf_counter()
            waited = begun - max(called, self._free_since)
            made = task.run(self._store, self._hosted(settings), loaded)
            if not isinstance(made.tables, list | tuple):  # the work is in making them
                receipt = commit(self._store, task, made)
            seconds = perf_counter() - begun
            self._free_since = begun + seconds
        return Done(receipt or commit(self._store, task, made), seconds, waited)

    def _hosted(self, settings: HostSettings | None) -> Any:
        """The host, built with the first task that needs it: not to load is that task's error."""
        if settings is not None and settings != self._settings:
            self._settings = self._host = None  # two models may not fit
            self._host = settings.build(self._store)
            self._settings = settings
        return self._host


def _failure(error: Exception) -> FailedCall:
    node = ray.util.get_node_ip_address()
    if isinstance(error, StillhouseError):
        return FailedCall(type(error).__name__, str(error), node)
    if isinstance(error, ImportError):
        return FailedCall("ClusterError", cannot_import(str(error)), node)
    if type(error).__name__ in {"AcceleratorError", "CudaError"}:
        os._exit(1)  # nothing works in this process any more: only a new one helps
    return FailedCall("Exception", "".join(traceback.format_exception(error)), node)


def cannot_import(reason: str) -> str:
    """What to say where a worker lacks code."""
    return (
        f"a worker cannot be started: {' '.join(reason.split())}. The nodes of `compute.address` "
        "need this package as the driver has it: install it there, or let `stillhouse submit` send "
        "the job's code"
    )
