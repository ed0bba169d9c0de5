"""The class that Ray Data runs in its pools: takes part descriptors, does them, gives receipts.

It holds one host object (a scanner, a packer, a scorer), made inside the worker process from small
plain values. A descriptor carries names and URIs, never data: the host reads and writes the store.
"""

import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from threading import Thread
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import ray
from ray.actor import ActorHandle

from stillhouse.actors.metrics import StepMetrics
from stillhouse.errors import StillhouseError
from stillhouse.storage.artifact import Receipt, Store


class Host(Protocol):
    """What a pool's worker hosts."""

    def run(self, task: Any) -> Receipt:
        """Do one task; its parts and receipt are in the store when this returns."""
        ...

    def prefetch(self, task: Any) -> None:
        """Read ahead what `task` will need; called from another thread."""
        ...


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a part could not be done: the error's class and message, and the node's address."""

    kind: str
    message: str
    part: str
    node: str


class PartWorker:
    """One worker of a pool. A failure of the task itself comes back as a row, not as a crash."""

    def __init__(
        self,
        make: Callable[[], Host],
        attempts: ActorHandle,
        store: Store,
        kind: str,
        metrics: StepMetrics,
    ) -> None:
        self._make = make
        self._made: Host | None = None
        self._attempts: Any = attempts
        self._store = store
        self._kind = kind
        self._metrics = metrics
        self._ahead: tuple[str, Thread] | None = None
        self._waited_s = 0.0
        self._node = ray.get_runtime_context().get_node_id()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Do the tasks of a block in order, reading one ahead; again only what is not finished.

        Args:
            batch: a column `task` of objects with a `fingerprint`.

        Returns:
            Columns `receipt` (or None), `error` (a `Failure`, or None) and `seconds`.
        """
        tasks: list[Any] = list(batch["task"])
        receipts = np.empty(len(tasks), object)
        errors = np.empty(len(tasks), object)
        seconds = np.zeros(len(tasks))
        for position, task in enumerate(tasks):
            started, self._waited_s = perf_counter(), 0.0
            receipts[position], errors[position] = self._one(task, tasks[position + 1 :])
            seconds[position] = perf_counter() - started
            self._metrics.part(seconds[position], self._waited_s)
        return {"receipt": receipts, "error": errors, "seconds": seconds}

    def _host(self) -> Host:
        """Made with the first task, so that a model that does not load is that task's error."""
        if self._made is None:
            self._made = self._make()
        return self._made

    def _run(self, task: Any, others: list[Any]) -> Receipt:
        """Wait for the data of a task, read those of the next one ahead, do it."""
        host, started = self._host(), perf_counter()
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead[1].join()
        if ahead is None or ahead[0] != task.fingerprint:
            host.prefetch(task)
        self._waited_s = perf_counter() - started
        if others:
            thread = Thread(target=host.prefetch, args=(others[0],), daemon=True)
            thread.start()
            self._ahead = others[0].fingerprint, thread
        return host.run(task)

    def _one(self, task: Any, others: list[Any]) -> tuple[Receipt | None, Failure | None]:
        name = str(task.fingerprint)
        before, given_up = ray.get(self._attempts.begin.remote(name, self._node))
        if given_up is not None:
            return None, self._failure("PartFailedError", f"part {name} {given_up}", name)
        try:
            done = self._store.finished(self._kind, [name]) if before else {}
            receipt = done.get(name) or self._run(task, others)
        except StillhouseError as error:
            return None, self._failure(type(error).__name__, str(error), name)
        except ImportError as error:
            return None, self._failure("ClusterError", cannot_import(str(error)), name)
        except Exception as error:
            if _poisons_process(error):
                os._exit(1)
            trace = "".join(traceback.format_exception(error))
            return None, self._failure("Exception", trace, name)
        finally:
            self._attempts.finish.remote(name)
        return receipt, None

    def _failure(self, kind: str, message: str, part: str) -> Failure:
        return Failure(kind, message, part, ray.util.get_node_ip_address())


@ray.remote
class CrewWorker:
    """A worker that stays for many steps, with one host for all of them.

    Ray neither makes a lost one again nor repeats its task: it could not tell a loss from a crew
    that is sent home, and would announce endless retries. The crew does both.
    """

    def __init__(self, make: Callable[[], Host], store: Store) -> None:
        self._host = cache(make)
        self._store = store

    def ready(self) -> None:
        """Answers when the worker runs."""

    def run(
        self, task: Any, kind: str, metrics: StepMetrics, attempts: ActorHandle
    ) -> tuple[Receipt | None, Failure | None, float]:
        """Do one task, as `PartWorker` does: its receipt or why there is none, and seconds."""
        done = PartWorker(self._host, attempts, self._store, kind, metrics)({"task": [task]})
        return done["receipt"][0], done["error"][0], float(done["seconds"][0])


def cannot_import(reason: str) -> str:
    """What to say where a worker lacks code."""
    return (
        f"a worker cannot be started: {' '.join(reason.split())}. The nodes of `compute.address` "
        "need this package as the driver has it: install it there, or let `stillhouse submit` send "
        "the job's code"
    )


def _poisons_process(error: Exception) -> bool:
    """A CUDA error leaves a context in which nothing works: only a new process helps."""
    return type(error).__name__ in {"AcceleratorError", "CudaError"}
