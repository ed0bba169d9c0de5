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
_KEYS = ("calls", "prompt_tokens", "completion_tokens")


@ray.remote
class _Counter:
    """Counts by model; every second, and when asked, it keeps the counts in the run's folder."""

    def __init__(self, uri: str, calls: int | None, tokens: int | None) -> None:
        self._uri, self._calls, self._tokens = uri, calls, tokens
        self._spent: dict[str, dict[str, int]] = {}
        with suppress(FileNotFoundError):
            self._spent = json.loads(read_bytes(uri))
        self._saved = monotonic()

    def take(self, role: str, calls: int) -> str | None:
        """Count calls that are about to be made; else the key of the limit that is reached."""
        if self._calls is not None and self._sum("calls") + calls > self._calls:
            return "calls"
        tokens = self._sum("prompt_tokens") + self._sum("completion_tokens")
        if self._tokens is not None and tokens >= self._tokens:
            return "tokens"
        self._add(role, (calls, 0, 0))
        return None

    def used(self, role: str, prompt_tokens: int, completion_tokens: int) -> None:
        self._add(role, (0, prompt_tokens, completion_tokens))

    def save(self) -> dict[str, dict[str, int]]:
        replace(self._uri, json.dumps(self._spent).encode())
        self._saved = monotonic()
        return self._spent

    def _sum(self, key: str) -> int:
        return sum(of[key] for of in self._spent.values())

    def _add(self, role: str, amounts: tuple[int, int, int]) -> None:
        of = self._spent.setdefault(role, dict.fromkeys(_KEYS, 0))
        for key, amount in zip(_KEYS, amounts, strict=True):
            of[key] += amount
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

    def take(self, role: str, calls: int) -> None:
        """Count calls that are about to be made.

        Raises:
            SpentError: there are not as many left.
        """
        reached: Any = ray.get(self.counter.take.remote(role, calls))
        if reached is not None:
            raise SpentError(
                f"`budget.{reached}` is spent: raise it and run again; nothing that was answered "
                "is asked for again"
            )

    def used(self, role: str, prompt_tokens: int, completion_tokens: int) -> None:
        """Count the tokens of calls that were answered."""
        ray.get(self.counter.used.remote(role, prompt_tokens, completion_tokens))

    def save(self) -> dict[str, dict[str, int]]:
        """Keep the counts: by model `calls`, `prompt_tokens`, `completion_tokens`."""
        return ray.get(self.counter.save.remote())

    def close(self) -> None:
        """Keep the counts, and terminate the actor."""
        self.save()
        ray.kill(self.counter)
