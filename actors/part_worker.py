"""The class that Ray Data runs in its pools: takes part descriptors, does them, gives receipts.

It holds one host object (a scanner, a packer, a scorer), made inside the worker process from small
plain values. A descriptor carries names and URIs, never data: the host reads and writes the store.
"""

import os
import traceback
from collections.abc import Callable
from threading import Thread
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import ray
from ray.actor import ActorHandle

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


class PartWorker:
    """One worker of a pool. A failure of the task itself comes back as a row, not as a crash."""

    def __init__(
        self, make: Callable[[], Host], attempts: ActorHandle, store: Store, kind: str
    ) -> None:
        self._make = make
        self._made: Host | None = None
        self._attempts: Any = attempts
        self._store = store
        self._kind = kind
        self._node = ray.get_runtime_context().get_node_id()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Do the tasks of a block in order, reading one ahead; again only what is not finished.

        Args:
            batch: a column `task` of objects with a `fingerprint`.

        Returns:
            Columns `receipt` (or None), `error` (or None: its class and message) and `seconds`.
        """
        tasks: list[Any] = list(batch["task"])
        receipts = np.empty(len(tasks), object)
        errors = np.empty(len(tasks), object)
        seconds = np.zeros(len(tasks))
        for position, task in enumerate(tasks):
            started = perf_counter()
            ahead = self._read_ahead(tasks[position + 1 : position + 2])
            receipts[position], errors[position] = self._one(task)
            seconds[position] = perf_counter() - started
            if ahead:
                ahead.join()
        return {"receipt": receipts, "error": errors, "seconds": seconds}

    def _host(self) -> Host:
        """Made with the first task, so that a model that does not load is that task's error."""
        if self._made is None:
            self._made = self._make()
        return self._made

    def _read_ahead(self, tasks: list[Any]) -> Thread | None:
        if not tasks or self._made is None:
            return None
        thread = Thread(target=self._made.prefetch, args=(tasks[0],), daemon=True)
        thread.start()
        return thread

    def _one(self, task: Any) -> tuple[Receipt | None, tuple[str, str] | None]:
        name = str(task.fingerprint)
        before, given_up = ray.get(self._attempts.begin.remote(name, self._node))
        if given_up is not None:
            return None, ("PartFailedError", f"part {name} {given_up}")
        try:
            done = self._store.finished(self._kind, [name]) if before else {}
            receipt = done.get(name) or self._host().run(task)
        except StillhouseError as error:
            return None, (type(error).__name__, str(error))
        except Exception as error:
            if _poisons_process(error):
                os._exit(1)
            return None, ("Exception", "".join(traceback.format_exception(error)))
        finally:
            self._attempts.finish.remote(name)
        return receipt, None


def _poisons_process(error: Exception) -> bool:
    """A CUDA error leaves a context in which nothing works: only a new process helps."""
    return type(error).__name__ in {"AcceleratorError", "CudaError"}
