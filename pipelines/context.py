"""The context of a job's steps, and how steps run: tasks that are done, or found finished."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from stillhouse.actors.metrics import StepMetrics
from stillhouse.compute_settings import ComputeSettings, WorkerSettings
from stillhouse.fingerprint import fingerprint
from stillhouse.storage import numbered
from stillhouse.storage.artifact import Manifest, Receipt, Store
from stillhouse.storage.task import Task

if TYPE_CHECKING:  # Ray is imported where there is something to do
    from stillhouse.actors.pool_worker import Done, HostSettings
    from stillhouse.pipelines.pool import Call, Pool

T = TypeVar("T")
R = TypeVar("R")


class Listener:
    """Receives a job's events; every method does nothing unless it is overridden."""

    def begin(self, step: str, total: int, reused: int, unit: str) -> None:
        """A step starts with `total` parts, `reused` of them already finished."""

    def advance(self, step: str, done: float, amount: float) -> None:
        """`done` more parts are finished; `amount` counts the step's unit, such as tokens."""

    def end(self, step: str, seconds: float) -> None:
        """The step is complete."""

    def note(self, kind: str, content: dict[str, Any]) -> None:
        """Any other event of the run."""


class PassingOn(Listener):
    """Passes every event on to another listener; a subclass does more with some."""

    def __init__(self, shown: Listener) -> None:
        self._shown = shown

    def begin(self, step: str, total: int, reused: int, unit: str) -> None:
        self._shown.begin(step, total, reused, unit)

    def advance(self, step: str, done: float, amount: float) -> None:
        self._shown.advance(step, done, amount)

    def end(self, step: str, seconds: float) -> None:
        self._shown.end(step, seconds)

    def note(self, kind: str, content: dict[str, Any]) -> None:
        self._shown.note(kind, content)


@dataclass
class StepWork:
    """What one step did: its parts, those found finished, and the cost of the others."""

    parts: int = 0
    reused: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    """Wall time in this run."""
    device_seconds: float = 0.0
    """Busy time of the workers in this run."""
    gpu_seconds: float = 0.0
    """The same times the GPUs that each held."""
    cpu_seconds: float = 0.0
    """The same times the cores that each held, of workers without GPU."""
    num_bytes: int = 0
    """Of its parts in the store, reused ones too."""

    def worked(self, seconds: float, resources: Mapping[str, Any]) -> None:
        """Add the busy time of workers that each hold Ray's `num_gpus` and `num_cpus`."""
        self.device_seconds += seconds
        self.gpu_seconds += seconds * resources["num_gpus"]
        self.cpu_seconds += seconds * resources["num_cpus"]


@dataclass(frozen=True, slots=True)
class FailedAt:
    """Where a job failed: the step, and the part (or training) and node, where known."""

    step: str | None = None
    part: str | None = None
    node: str | None = None


class Unfinished(Exception):
    """Raised by a dry run at the first step that has something to do."""


@dataclass
class Context:
    """What all steps of a job share; holds no data.

    Attributes:
        dry: only look: the first step with something to do raises `Unfinished`.
        packed: for a plan that walks the part of the pool which is packed: what each scan dropped.
        run: fingerprint of the run, for metrics.
        pool: the workers that tasks go to, once there are some.
    """

    store: Store
    compute: ComputeSettings
    listener: Listener
    dry: bool = False
    packed: Mapping[str, str] | None = None
    run: str = ""
    failed_at: FailedAt | None = None
    pool: "Pool | None" = None
    work: dict[str, StepWork] = field(default_factory=dict)

    def close_pool(self) -> None:
        """Terminate the pool's workers, to make room for a training or because the job ends."""
        if self.pool is not None:
            self.pool.close()
        self.pool = None

    def metrics(self, step: str) -> StepMetrics:
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


@dataclass(frozen=True, slots=True)
class Step:
    """Tasks of one kind.

    Attributes:
        title: in progress, events and accounts.
        tasks: in order; equal ones are done once.
        host: what workers keep between tasks, such as a model.
        workers: the most that are used, by default one for each CPU. Results do not depend on it.
        on: resources of a worker; by default `compute.cpus_per_worker` alone.
        unit: the count of a receipt that is shown as the rate.
    """

    title: str
    tasks: Sequence[Task]
    host: "HostSettings | None" = None
    workers: int | None = None
    on: WorkerSettings | None = None
    unit: str = "tokens"


def perform(ctx: Context, step: Step) -> list[Receipt]:
    """Do every task that has no receipt in the store yet; the receipts of all, in order.

    Raises:
        Unfinished: a dry run has something to do.
        PartFailedError: a task kept killing its worker. Any error of a task.
    """
    tasks = {task.fingerprint: task for task in step.tasks}
    by_kind: dict[str, list[str]] = {}
    for name, task in tasks.items():
        by_kind.setdefault(task.KIND, []).append(name)
    done: dict[str, Receipt] = {}
    for kind, names in by_kind.items():
        done |= ctx.store.finished(kind, names)
    todo = [task for name, task in tasks.items() if name not in done]
    total, reused = len(step.tasks), len(step.tasks) - len(todo)
    with ctx.step(step.title, total=total, reused=reused, unit=step.unit) as advance:
        if todo:
            from stillhouse.pipelines.pool import Call

            resources = _options(ctx.compute, step.on)
            calls = deque(Call(task.fingerprint, "do", (task, step.host)) for task in todo)
            for _, result in _run(ctx, step.title, calls, step.workers, step.on):
                receipt: Receipt = result.value
                done[receipt.task] = receipt
                ctx.work[step.title].worked(result.seconds, resources)
                advance(1, receipt.counts.get(step.unit, 0))
            for kind, names in by_kind.items():
                ctx.store.remember(kind, [done[name] for name in names])
        sizes = (part.num_bytes for receipt in done.values() for part in receipt.parts)
        ctx.work[step.title].num_bytes += sum(sizes)
    return [done[task.fingerprint] for task in step.tasks]


def run_tasks(
    ctx: Context, function: Callable[[T], R], items: Iterable[T], *, in_flight: int = 64
) -> Iterator[R]:
    """`map(function, items)` on workers: results in order, at most `in_flight` waiting."""
    left, index = enumerate(items), 0
    first = list(islice(left, in_flight))
    if not first:
        return
    if ctx.dry:
        raise Unfinished("small tasks")
    from stillhouse.pipelines.pool import Call

    calls = deque(Call(str(i), "call", (function, item)) for i, item in first)
    waiting: dict[int, R] = {}
    for call, result in _run(ctx, "", calls, None, None):
        waiting[int(call.name)] = result.value
        while index in waiting:
            yield waiting.pop(index)
            index += 1
            calls.extend(Call(str(i), "call", (function, item)) for i, item in islice(left, 1))


def _options(compute: ComputeSettings, on: WorkerSettings | None) -> dict[str, Any]:
    """Ray's options for a worker of the pool."""
    from stillhouse.pipelines.placement import actor_options

    return compute.resources(0) if on is None else actor_options(compute, on)


def _run(
    ctx: Context,
    title: str,
    calls: "deque[Call]",
    workers: int | None,
    on: WorkerSettings | None,
) -> "Iterator[tuple[Call, Done]]":
    """Make calls on the pool, started anew where the workers need other resources."""
    from stillhouse.pipelines.placement import num_cpus
    from stillhouse.pipelines.pool import Pool, TaskFailed

    compute = ctx.compute
    options = _options(compute, on)
    if ctx.pool is None or ctx.pool.options != options:
        ctx.close_pool()
        ctx.pool = Pool(ctx.store, options, compute.max_attempts, ctx.listener.note)
    pool, width = ctx.pool, workers or max(1, int(num_cpus() / compute.cpus_per_worker))
    try:
        yield from pool.run(calls, width, ctx.metrics(title))
    except TaskFailed as failed:
        if title:
            ctx.failed_at = FailedAt(title, failed.name, failed.node)
        raise failed.error from None
    finally:
        if pool.busy:
            ctx.close_pool()


def pinned(
    ctx: Context,
    step: str,
    key: object,
    pin: Literal["first", "refresh"],
    wanted: str,
    make: Callable[[], Manifest],
) -> Manifest:
    """A model artifact that is kept when shards are added (`pin: first`).

    A pin is a numbered create-only object that names an artifact; `pin: refresh` adds a number.

    Args:
        step: announced as reused where nothing is made; else `make` announces it.
        key: settings whose change starts a new pin.
        wanted: fingerprint of what the inputs of today would give.
        make: makes that artifact.

    Raises:
        Unfinished: a plan of a part of the pool with `refresh`: the name of what the whole pool
            would give is not known.
    """
    if ctx.packed is not None and pin == "refresh":
        with ctx.step(step, total=1, reused=0):
            raise Unfinished(step)
    folder = ctx.store.path("pins", fingerprint(key))
    current = numbered.current(folder)
    kept = None
    if current is not None and (pin == "first" or current["models"] == wanted):
        kept = ctx.store.find_manifest("models", current["models"])
    found = kept or ctx.store.find_manifest("models", wanted)
    if found is not None:
        with ctx.step(step, total=1, reused=1):
            pass
    made = found or make()
    if kept is None and not ctx.dry:
        numbered.append(folder, {"models": made.fingerprint})
    return made
