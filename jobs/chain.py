"""`job: chain`: every step is an ordinary job, found again by its content.

A step starts when those that it names are finished; steps that do not depend on each other run
side by side where the cluster has room. The chain's own record is named by its spec alone: it
tells how its steps stand, and its report links theirs.
"""

import os
import re
import threading
import time
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from typing import Any

from stillhouse.errors import SpecError, StepFailedError, StillhouseError, require
from stillhouse.fingerprint import fingerprint
from stillhouse.jobs import process
from stillhouse.jobs.chain_result import StepResult, chain_numbers, chain_result
from stillhouse.jobs.chain_spec import AnySpec, ChainSpec
from stillhouse.jobs.kinds import Job
from stillhouse.jobs.run import SUBMISSION_VARIABLE, JobRun, connected, list_job, recorded, run_job
from stillhouse.named_inputs import artifacts_of, inputs_by_name
from stillhouse.pipelines.context import FailedAt, Listener
from stillhouse.report.page import write
from stillhouse.spec import NOT_IDENTITY, JobSpec
from stillhouse.storage.artifact import Store
from stillhouse.storage.commit import check_store
from stillhouse.storage.filesystem import (
    FileInfo,
    absolute_uri,
    exists,
    remember_options,
    use_options,
)
from stillhouse.storage.run_record import RunRecord, read_json

CHAIN_VERSION = 1
_MADE = {
    "select": ("selection", "tokenizer", "prior", "conditional"),
    "train": ("model", "tokenizer"),
    "mix": ("model", "tokenizer"),
    "distill": (),
}
"""By job: the artifacts that other steps may take of it."""
_STEP_NAME = re.compile(r"[A-Za-z][\w-]*")
_ID = re.compile(r"[0-9a-f]{8,64}")


class Chain:
    """The steps of a chain, checked as far as can be before any has run.

    Attributes:
        needs: of each step, the steps that it names.
        order: each after those that it needs.
        files: the listed inputs of steps that need no others.

    Raises:
        SpecError: an unknown step, one that makes no such artifact, or a cycle.
        StillhouseError: as `list_job`.
    """

    def __init__(self, spec: ChainSpec) -> None:
        self.spec = spec
        self.needs = {name: _needs(spec, name) for name in spec.steps}
        try:
            self.order = [*TopologicalSorter(self.needs).static_order()]
        except CycleError as error:
            cycle = " -> ".join(error.args[1])
            raise SpecError(f"`steps`: each of these waits for the next one: {cycle}") from None
        first = [name for name in self.order if not self.needs[name]]
        self.files: list[list[FileInfo]] = [
            files for name in first for files in list_job(spec.step(name, {})).files
        ]

    @property
    def name(self) -> str:
        """The fingerprint of the chain: of its steps as they are written."""
        steps = {
            name: step.model_dump(mode="json", exclude=NOT_IDENTITY, exclude_unset=True)
            for name, step in self.spec.steps.items()
        }
        return fingerprint(["chain", CHAIN_VERSION, steps])


def _needs(spec: ChainSpec, step: str) -> list[str]:
    """The steps that a step names, each once."""
    found: list[str] = []
    for section, name in inputs_by_name(spec.steps[step]):
        if name not in spec.steps:
            a_word = _STEP_NAME.fullmatch(name) and not _ID.fullmatch(name)
            if a_word and not exists(absolute_uri(name)):
                raise SpecError(
                    f"`steps.{step}`: `from: {name}` in `{section}`: no step has this name "
                    f"({', '.join(spec.steps)}), and it is no run, name or URI"
                )
            continue
        job = getattr(spec.steps[name], "job", "")
        if not {*artifacts_of(section)} & {*_MADE[job]}:
            raise SpecError(
                f"`steps.{step}`: `from: {name}` in `{section}`: a step of `job: {job}` makes no "
                f"{artifacts_of(section)[0]}"
            )
        found.append(name)
    return [name for name in spec.steps if name in found]


def run_spec(spec: AnySpec, shown: Listener) -> dict[str, Any]:
    """Run a chain or any other job; the object that `run --json` prints.

    Raises:
        StillhouseError: as `run_chain` and `run_job`.
    """
    return run_chain(spec, shown) if isinstance(spec, ChainSpec) else run_job(spec, shown)


def list_spec(spec: AnySpec) -> "Job | Chain":
    """Check what a spec names and list its inputs, as far as they are there."""
    return Chain(spec) if isinstance(spec, ChainSpec) else list_job(spec)


def run_chain(spec: ChainSpec, shown: Listener) -> dict[str, Any]:
    """Run the steps that are not finished; the object that `run --json` prints.

    Raises:
        StepFailedError: a step failed; `details` have the results of all that are finished.
        StillhouseError: as `run_job`; run again to go on.
    """
    require("ray", "torch", "transformers")
    worker_env = use_options(spec.store, spec.storage_options)
    remember_options(spec.store, spec.storage_options)
    chain = Chain(spec)
    store = Store(check_store(spec.store))
    record = RunRecord(store, chain.name)
    steps = _Steps(chain, shown)
    steps.find_ready()
    if not steps.ready:
        before = read_json(record.uri, "result.json")
        if before is not None and steps.same_runs(before):
            numbers = chain_numbers(steps.results)
            return before | numbers | {"status": "nothing_to_do", "work": steps.work()}
    steps.record = record
    record.start(spec.to_yaml(), "chain", os.environ.get(SUBMISSION_VARIABLE), spec.name)
    with recorded(record, spec, lambda: FailedAt(steps.failed)):
        if steps.ready:
            with connected(spec, worker_env, record):
                steps.run_all()
        for name in chain.order:
            steps.note(name)
        result = chain_result(spec, chain.needs, steps.results, store, record.uri)
    numbers = write(result)
    record.put_result(numbers)
    record.finish("done")
    return numbers


@dataclass
class _Steps:
    """The steps of a chain that runs.

    Attributes:
        results: of the finished steps, in the order in which they ended.
        ready: steps that may start.
        failed: the first step that failed.
    """

    chain: Chain
    shown: Listener
    record: RunRecord | None = None
    results: dict[str, StepResult] = field(default_factory=dict[str, StepResult])
    ready: dict[str, JobRun] = field(default_factory=dict[str, JobRun])
    failed: str | None = None

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._running: dict[Future[dict[str, Any]], str] = {}
        self._began: dict[str, float] = {}

    def find_ready(self) -> None:
        """Find the steps whose inputs are there; those that are finished make others ready."""
        for name in self.chain.order:
            known = {*self.results, *self.ready, *self._running.values()}
            if name in known or not {*self.chain.needs[name]} <= {*self.results}:
                continue
            runs = {one: made.result["run"] for one, made in self.results.items()}
            run = JobRun(self.chain.spec.step(name, runs))
            found = run.finished()
            if found is None:
                self.ready[name] = run
            else:
                self.results[name] = StepResult("reused", found, 0.0)

    def run_all(self) -> None:
        """Run all that is ready or becomes so, side by side where there is room."""
        with ThreadPoolExecutor(len(self.chain.order)) as threads:
            try:
                while self.ready or self._running:
                    for name in [*self.ready]:
                        if self.failed is None and self._has_room(name):
                            self._start(threads, name)
                    if not self._running:
                        break
                    done, _ = wait(self._running, return_when=FIRST_COMPLETED)
                    for future in done:
                        self._end(self._running.pop(future), future)
                    if self.failed is None:
                        self.find_ready()
            except BaseException:
                self._stop.set()  # the threads end at their next event
                raise
        if self.failed is not None:
            raise self._error

    def _start(self, threads: ThreadPoolExecutor, name: str) -> None:
        run, listener = self.ready.pop(name), _StepListener(name, self)
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
        if self.failed is None:
            self.failed = name
            code = error.exit_code if isinstance(error, StillhouseError) else 1
            text = process.failure_text(error)
            steps = chain_numbers(self.results)
            steps["chain"]["steps"][name] = {"status": "failed", "error": text}
            self._error = StepFailedError(f"step `{name}`: {text}", code, steps)
            self._error.__cause__ = error

    def _has_room(self, name: str) -> bool:
        """Whether all actors of a step fit beside those of the steps that run."""
        import ray

        if not self._running:
            return True
        steps = [self.chain.spec.step(one, {}) for one in (name, *self._running.values())]
        there = ray.cluster_resources()
        return all(
            sum(_resources(step)[kind] for step in steps) <= there.get(kind, 0)
            for kind in ("CPU", "GPU")
        )

    def note(self, name: str) -> None:
        """Write how a step stands to the chain's record."""
        made = self.results.get(name)
        assert self.record is not None
        self.record.step(
            name,
            state="running" if made is None else "done",
            parts=1,
            done=int(made is not None),
            reused=int(made is not None and made.status == "reused"),
            **({} if made is None else {"seconds": round(made.seconds, 3)}),
        )
        event = {"step": name, "status": "started" if made is None else made.status}
        self.record.event("chain step", event, flush=True)

    def same_runs(self, before: Mapping[str, Any]) -> bool:
        """Whether an earlier result of the chain is of the same runs."""
        runs = {name: step["run"] for name, step in before["chain"]["steps"].items()}
        return runs == {name: made.result["run"] for name, made in self.results.items()}

    def work(self) -> dict[str, dict[str, int]]:
        return {name: {"parts": 1, "reused": 1} for name in self.results}

    def pass_on(self, name: str, *arguments: Any) -> None:
        """Call a method of the listener, from any thread.

        Raises:
            KeyboardInterrupt: the chain was stopped.
        """
        if self._stop.is_set():
            raise KeyboardInterrupt
        with self._lock:
            getattr(self.shown, name)(*arguments)


class _StepListener(Listener):
    """Passes on the events of one step, under its name."""

    def __init__(self, name: str, steps: _Steps) -> None:
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


def _resources(spec: JobSpec) -> dict[str, float]:
    """What the actors of a job hold at once."""
    compute = spec.compute
    gpus = max(compute.gpus_of(compute.scorer), compute.trainer_gpus)
    return {"CPU": spec.num_actors * compute.cpus_per_worker, "GPU": spec.num_actors * gpus}
