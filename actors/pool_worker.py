"""The worker of a pool: runs one task while it reads for the next and writes the previous one.

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
from ray.exceptions import RayTaskError

from stillhouse.errors import StillhouseError, StoreUnreachableError
from stillhouse.storage.artifact import Store
from stillhouse.storage.task import Task, commit


class HostSettings(Protocol):
    """Settings that a worker builds its host from; they are compared to reuse the host."""

    def build(self, store: Store) -> Any: ...


@dataclass(frozen=True, slots=True)
class FailedCall:
    """An error of a call: its class and message, and the node's address."""

    kind: str
    message: str
    node: str

    @property
    def retryable(self) -> bool:
        """Whether another node, or a later time, may succeed."""
        return self.kind == StoreUnreachableError.__name__


@dataclass(frozen=True, slots=True)
class Done:
    """The end of a call.

    Attributes:
        value: the result, or a `FailedCall`.
        seconds: of work.
        waited_s: for data, before.
    """

    value: Any
    seconds: float = 0.0
    waited_s: float = 0.0


@ray.remote
class PoolWorker:
    """Runs tasks. Two are called at a time: one runs while the other reads or writes.

    Ray neither restarts a lost worker nor repeats its calls: the pool does, because it knows
    whether the task was at fault.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._working = Lock()
        self._free_since = 0.0
        self._settings: HostSettings | None = None
        self._host: Any = None

    def node(self) -> str:
        """The id of its node; answered once it runs."""
        return ray.get_runtime_context().get_node_id()

    def do(self, task: Task, settings: HostSettings | None, again: bool) -> Done:
        """Run a task; if it was begun before (`again`), only if it has no receipt."""
        try:
            return self._do(task, settings, again)
        except Exception as error:
            return Done(_failure(error))

    def call(self, function: Callable[[Any], Any], item: Any) -> Done:
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
            if settings is not None and settings != self._settings:
                self._settings = self._host = None  # two models may not fit
                self._host = settings.build(self._store)
                self._settings = settings
            made = task.run(self._store, self._host, loaded)
            if not isinstance(made.tables, list | tuple):  # a generator: writing is the work
                receipt = commit(self._store, task, made)
            seconds = perf_counter() - begun
            self._free_since = begun + seconds
        return Done(receipt or commit(self._store, task, made), seconds, waited)


def _failure(error: Exception) -> FailedCall:
    node = ray.util.get_node_ip_address()
    if isinstance(error, StillhouseError):
        return FailedCall(type(error).__name__, str(error), node)
    if isinstance(error, ImportError):
        return FailedCall("ClusterError", cannot_import(str(error)), node)
    if type(error).__name__ in {"AcceleratorError", "CudaError"}:
        os._exit(1)  # CUDA does not recover in this process: a new one is needed
    return FailedCall("Exception", "".join(traceback.format_exception(error)), node)


def cannot_import(reason: str) -> str:
    """The message for a worker that lacks code."""
    return (
        f"a worker cannot be started: {' '.join(reason.split())}. The nodes of `compute.address` "
        "need this package as the driver has it: install it there, or let `stillhouse submit` send "
        "the job's code"
    )


def get_result(references: Any) -> Any:
    """`ray.get`, but an error of ours is raised as it was, without Ray's frames around it.

    What `ray.get` raises is also an instance of the cause's class, but without its attributes:
    only its `cause` can be relied on.
    """
    try:
        return ray.get(references)
    except RayTaskError as error:
        if isinstance(error.cause, StillhouseError):
            raise error.cause from None
        raise
