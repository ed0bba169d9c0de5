"""Several jobs in one driver, each after those that it needs, side by side where there is room."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Protocol

from stillhouse.errors import StepFailedError, StillhouseError
from stillhouse.jobs import process
from stillhouse.jobs.kinds import result_artifact
from stillhouse.pipelines.context import Listener, StepWork
from stillhouse.pipelines.results import HELD
from stillhouse.spec import JobSpec
from stillhouse.storage.filesystem import join
from stillhouse.storage.run_record import RunRecord


@dataclass(frozen=True, slots=True)
class StepResult:
    """A finished step: `done` in this run, or `reused`; what its own run printed; wall seconds."""

    status: str
    result: Mapping[str, Any]
    seconds: float

    @property
    def artifact(self) -> str:
        """The URI of its main artifact."""
        kind, name = result_artifact({**self.result})
        return join(self.result["run"].rsplit("/", 2)[0], kind, name)

    @property
    def work(self) -> StepWork:
        work, cost = self.result["work"].values(), self.result.get("cost", {})
        return StepWork(
            parts=sum(one["parts"] for one in work),
            reused=sum(one["reused"] for one in work),
            flops=sum(cost.get("flops", {}).values()),
            seconds=self.seconds,
            device_seconds=sum(cost.get("device_seconds", {}).values()),
            **{key: self.result.get("price", {}).get(key, 0) for key in HELD},
        )


class Runnable(Protocol):
    """A job that is about to run."""

    @property
    def spec(self) -> JobSpec: ...

    def finished(self) -> dict[str, Any] | None:
        """The result of an earlier run, or None."""
        ...

    def start(self, shown: Listener) -> dict[str, Any]:
        """Run it to its end."""
        ...


@dataclass
class Steps:
    """Jobs by name; called in one thread, which waits for them.

    Attributes:
        order: all names, each after those that it needs.
        needs: by name, the others whose results it uses.
        prepare: makes a job, given the URIs of the runs that are finished.
        shown: gets the events of all, under their names.
        behind: by name, the other that is finished first because it makes what both need.
        keep_going: start others after one has failed.
        record: how they stand is written to it.
        results: of the finished ones, in the order in which they ended.
        ready: those that may start.
        failures: the errors of those that failed, the first one first.
    """

    order: Sequence[str]
    needs: Mapping[str, Sequence[str]]
    prepare: Callable[[str, Mapping[str, str]], Runnable]
    shown: Listener
    behind: Mapping[str, str] = field(default_factory=dict[str, str])
    keep_going: bool = False
    record: RunRecord | None = None
    results: dict[str, StepResult] = field(default_factory=dict[str, StepResult])
    ready: dict[str, Runnable] = field(default_factory=dict[str, Runnable])
    failures: dict[str, Exception] = field(default_factory=dict[str, Exception])

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._running: dict[Future[dict[str, Any]], str] = {}
        self._specs: dict[str, JobSpec] = {}
        self._began: dict[str, float] = {}

    def find_ready(self) -> None:
        """Find the jobs whose inputs are there; those that are finished make others ready."""
        for name in self.order:
            known = {*self.results, *self.ready, *self._running.values(), *self.failures}
            if name in known or not {*self.needs.get(name, ())} <= {*self.results}:
                continue
            runs = {one: made.result["run"] for one, made in self.results.items()}
            job = self.prepare(name, runs)
            found = job.finished()
            if found is None:
                self.ready[name] = job
            else:
                self.results[name] = StepResult("reused", found, 0.0)

    def run_all(self) -> None:
        """Run all that is ready or becomes so, side by side where there is room."""
        with ThreadPoolExecutor(len(self.order)) as threads:
            try:
                while self.ready or self._running:
                    for name in [*self.ready]:
                        if self._goes_on and not self._waits(name) and self._has_room(name):
                            self._start(threads, name)
                    if not self._running:
                        break
                    done, _ = wait(self._running, return_when=FIRST_COMPLETED)
                    for future in done:
                        self._end(self._running.pop(future), future)
                    if self._goes_on:
                        self.find_ready()
            except BaseException:
                self._stop.set()  # the threads end at their next event
                raise

    @property
    def _goes_on(self) -> bool:
        return self.keep_going or not self.failures

    def _start(self, threads: ThreadPoolExecutor, name: str) -> None:
        run, listener = self.ready.pop(name), _StepListener(name, self)
        self._specs[name] = run.spec
        self._began[name] = time.monotonic()
        self.note(name)
        self._running[threads.submit(run.start, listener)] = name

    def _end(self, name: str, future: Future[dict[str, Any]]) -> None:
        seconds = time.monotonic() - self._began[name]
        error = future.exception()
        if error is None:
            self.results[name] = StepResult("done", future.result(), seconds)
            self.note(name)
            return
        if not isinstance(error, Exception):
            raise error
        self.failures[name] = error

    def _waits(self, name: str) -> bool:
        """Whether a job comes behind one that is not finished yet."""
        first = self.behind.get(name)
        return first is not None and first not in {*self.results, *self.failures}

    def _has_room(self, name: str) -> bool:
        """Whether all actors of a job fit beside those of the jobs that run."""
        import ray

        if not self._running:
            return True
        steps = [self.ready[name].spec, *(self._specs[one] for one in self._running.values())]
        there = ray.cluster_resources()
        return all(
            sum(_resources(step)[kind] for step in steps) <= there.get(kind, 0)
            for kind in ("CPU", "GPU")
        )

    def note(self, name: str) -> None:
        """Write how a job stands to the record."""
        made = self.results.get(name)
        if self.record is None:
            return
        self.record.step(
            name,
            state="running" if made is None else "done",
            parts=1,
            done=int(made is not None),
            reused=int(made is not None and made.status == "reused"),
            **({} if made is None else {"seconds": round(made.seconds, 3)}),
        )
        event = {"step": name, "status": "started" if made is None else made.status}
        self.record.event("job", event, flush=True)

    def pass_on(self, name: str, *arguments: Any) -> None:
        """Call a method of the listener, from any thread.

        Raises:
            KeyboardInterrupt: all are stopped.
        """
        if self._stop.is_set():
            raise KeyboardInterrupt
        with self._lock:
            getattr(self.shown, name)(*arguments)


class _StepListener(Listener):
    """Passes on the events of one job, under its name."""

    def __init__(self, name: str, steps: Steps) -> None:
        self._name, self._steps = name, steps

    def begin(self, step: str, total: int, reused: int, unit: str) -> None:
        self._steps.pass_on("begin", f"{self._name}: {step}", total, reused, unit)

    def advance(self, step: str, done: float, amount: float) -> None:
        self._steps.pass_on("advance", f"{self._name}: {step}", done, amount)

    def end(self, step: str, seconds: float) -> None:
        self._steps.pass_on("end", f"{self._name}: {step}", seconds)

    def note(self, kind: str, content: dict[str, Any]) -> None:
        if "message" in content:
            content = content | {"message": f"{self._name}: {content['message']}"}
        self._steps.pass_on("note", kind, content)


def step_failed(what: str, error: Exception, details: Mapping[str, Any]) -> StepFailedError:
    """The error of a failed step: `what` and its message, and its exit code."""
    code = error.exit_code if isinstance(error, StillhouseError) else 1
    return StepFailedError(f"{what}: {process.failure_text(error)}", code, details)


def _resources(spec: JobSpec) -> dict[str, float]:
    """What the actors of a job hold at once."""
    compute = spec.compute
    gpus = max(compute.gpus_of(compute.scorer), compute.trainer_gpus)
    return {"CPU": spec.num_actors * compute.cpus_per_worker, "GPU": spec.num_actors * gpus}
