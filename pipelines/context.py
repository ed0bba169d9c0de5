"""What every step of a pipeline is given: the store, the width, and whom to tell."""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Protocol

from stillhouse.actors.metrics import StepMetrics
from stillhouse.spec import ComputeSettings
from stillhouse.storage.artifact import Store


class Listener(Protocol):
    """Told what happens; a progress bar, a log, the run's events."""

    def begin(self, step: str, total: int, reused: int, unit: str) -> None:
        """A step starts with `total` parts, `reused` of them found finished."""
        ...

    def advance(self, step: str, done: float, amount: float) -> None:
        """`done` more parts of the step are finished, `amount` units of work in them."""
        ...

    def end(self, step: str, seconds: float) -> None:
        """The step is complete."""
        ...

    def note(self, kind: str, content: dict[str, Any]) -> None:
        """Anything else worth keeping in the run's events."""
        ...


@dataclass
class StepWork:
    """What one step did: parts in all, those found finished, and what the others cost."""

    parts: int = 0
    reused: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    """Wall time of the step in this run."""
    device_seconds: float = 0.0
    """Busy time of its workers in this run."""


@dataclass(frozen=True, slots=True)
class FailedAt:
    """Where a job stopped: the step, and the part (or training) and node where one is to blame."""

    step: str | None = None
    part: str | None = None
    node: str | None = None


class Unfinished(Exception):
    """Raised by a dry run at the first step that has something to do."""


@dataclass
class Context:
    """Handed down through a pipeline; holds no data.

    A `dry` context only looks: the first step with something to do raises `Unfinished`.
    """

    store: Store
    compute: ComputeSettings
    listener: Listener
    dry: bool = False
    packed: Mapping[str, str] | None = None
    """For a plan that walks the part of the pool which is packed: what each scan left out."""
    run: str = ""
    """Fingerprint of the run, for metrics."""
    failed_at: FailedAt | None = None
    pool: Any = None
    """The `stillhouse.pipelines.pool.Pool` that small work goes to, once there is some."""
    work: dict[str, StepWork] = field(default_factory=dict)

    def close_pool(self) -> None:
        """Terminate the pool's workers: a training needs their place, or the job is done."""
        if self.pool is not None:
            self.pool.close()
        self.pool = None

    def metrics(self, step: str) -> StepMetrics:
        """What records for a step."""
        return StepMetrics(self.run, step)

    @contextmanager
    def step(
        self, name: str, *, total: int, reused: int, unit: str = "tokens"
    ) -> Generator[Callable[[float, float], None]]:
        """Announce a step and account for its time; yields `advance(done, amount)`."""
        work = self.work.setdefault(name, StepWork())
        work.parts += total
        work.reused += reused
        metrics = self.metrics(name)
        self.listener.begin(name, total, reused, unit)
        started = perf_counter()
        if self.dry and reused < total:
            raise Unfinished(name)
        metrics.expect(total - reused)

        def advance(done: float, amount: float) -> None:
            self.listener.advance(name, done, amount)
            metrics.advance(done, amount if unit == "tokens" else 0)

        try:
            yield advance
        except Exception:
            self.failed_at = self.failed_at or FailedAt(name)
            raise
        seconds = perf_counter() - started
        work.seconds += seconds
        self.listener.end(name, seconds)
