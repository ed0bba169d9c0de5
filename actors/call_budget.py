"""The count of a job's calls of models, for all its workers: stops them once a budget is spent."""

import json
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any

import ray

from stillhouse.errors import SpentError
from stillhouse.storage.commit import replace
from stillhouse.storage.filesystem import read_bytes

_SAVE_S = 1.0


@ray.remote
class _Counter:
    """Counts; every second, and when asked, it keeps the counts in the run's folder."""

    def __init__(self, uri: str, calls: int | None, tokens: int | None) -> None:
        self._uri, self._limits = uri, {"calls": calls, "tokens": tokens}
        self._spent = {"calls": 0, "tokens": 0}
        with suppress(FileNotFoundError):
            self._spent |= json.loads(read_bytes(uri))
        self._saved = monotonic()

    def take(self, calls: int) -> str | None:
        """Count calls that are about to be made; else the key of the limit that is reached."""
        limit = self._limits["calls"]
        if limit is not None and self._spent["calls"] + calls > limit:
            return "calls"
        limit = self._limits["tokens"]
        if limit is not None and self._spent["tokens"] >= limit:
            return "tokens"
        self._add("calls", calls)
        return None

    def used(self, tokens: int) -> None:
        self._add("tokens", tokens)

    def save(self) -> dict[str, int]:
        replace(self._uri, json.dumps(self._spent).encode())
        self._saved = monotonic()
        return self._spent

    def _add(self, key: str, amount: int) -> None:
        self._spent[key] += amount
        if monotonic() - self._saved > _SAVE_S:
            self.save()


@dataclass(frozen=True, slots=True)
class CallBudget:
    """A handle of the count; it is sent to workers."""

    counter: Any

    @classmethod
    def start(cls, uri: str, calls: int | None, tokens: int | None) -> "CallBudget":
        """Begin where an earlier run of the job stopped: `uri` holds its counts."""
        counter: Any = _Counter
        made = counter.options(num_cpus=0, max_restarts=-1, max_task_retries=-1)
        return cls(made.remote(uri, calls, tokens))

    def take(self, calls: int) -> None:
        """Count calls that are about to be made.

        Raises:
            SpentError: there are not as many left.
        """
        reached: Any = ray.get(self.counter.take.remote(calls))
        if reached is not None:
            raise SpentError(
                f"`budget.{reached}` is spent: raise it and run again; nothing that was answered "
                "is asked for again"
            )

    def used(self, tokens: int) -> None:
        self.counter.used.remote(tokens)

    def save(self) -> dict[str, int]:
        """Keep the counts, `calls` and `tokens`, which are returned."""
        return ray.get(self.counter.save.remote())

    def close(self) -> None:
        """Keep the counts, and terminate the actor."""
        self.save()
        ray.kill(self.counter)
