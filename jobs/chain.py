"""`job: chain`: every step is an ordinary job, found again by its content.

A step starts when those that it names are finished; steps that do not depend on each other run
side by side where the cluster has room. The chain's own record is named by its spec alone: it
tells how its steps stand, and its report links theirs.
"""

import os
import re
from collections.abc import Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Any

from stillhouse.errors import SpecError, StepFailedError
from stillhouse.fingerprint import fingerprint
from stillhouse.jobs import process
from stillhouse.jobs.chain_result import chain_numbers, chain_result
from stillhouse.jobs.chain_spec import AnySpec, ChainSpec
from stillhouse.jobs.kinds import Job, Spec
from stillhouse.jobs.run import (
    SUBMISSION_VARIABLE,
    JobRun,
    connected,
    list_job,
    recorded,
    worker_environment,
)
from stillhouse.jobs.steps import Runnable, StepResult, Steps, step_failed
from stillhouse.jobs.sweep import SweepRun
from stillhouse.jobs.sweep_spec import SweepSpec
from stillhouse.named_inputs import artifacts_of, inputs_by_name
from stillhouse.pipelines.context import FailedAt, Listener
from stillhouse.report.page import write
from stillhouse.spec import NOT_IDENTITY, SelectSpec
from stillhouse.storage.artifact import Store
from stillhouse.storage.commit import check_store
from stillhouse.storage.filesystem import (
    FileInfo,
    absolute_uri,
    exists,
)
from stillhouse.storage.run_record import RunRecord, read_json

CHAIN_VERSION = 1
_MADE = {
    "select": ("selection", "tokenizer", "prior", "conditional"),
    "train": ("model", "tokenizer"),
    "mix": ("model", "tokenizer"),
    "distill": (),
    "generate": ("generated",),
}
"""By job: the artifacts that other steps may take of it."""
_STEP_NAME = re.compile(r"[A-Za-z][\w-]*")
_ID = re.compile(r"[0-9a-f]{8,64}")


class Chain:
    """The steps of a chain, checked as far as can be before any has run.

    Attributes:
        needs: of each step, the steps that it names.
        order: each after those that it needs.
        behind: of each `select` of a pool, the first one of that pool, which makes what they share.
        files: what `list_inputs` found.

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
        self.behind = _behind(spec, self.order)
        self.files: list[list[FileInfo]] = []

    def list_inputs(self) -> "Chain":
        """List the inputs of steps that need no others, as running them does, too."""
        first = [name for name in self.order if not self.needs[name]]
        specs = [self.spec.step(name, {}) for name in first]
        self.files = [files for spec in specs for files in list_spec(spec).files]
        return self

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
        step_spec: Any = spec.steps[name]
        job = getattr(step_spec, "of", step_spec).job
        mixes = isinstance(step_spec, SweepSpec) and step_spec.sweep.mixture is not None
        made = {*_MADE[job], *(["weights"] if mixes else [])}
        if made.isdisjoint(artifacts_of(section)):
            needs = " without `sweep.mixture`" if section == "weight" else ""
            raise SpecError(
                f"`steps.{step}`: `from: {name}` in `{section}`: a step of `job: {job}`{needs} "
                f"makes no {artifacts_of(section)[0]}"
            )
        if section == "weight":
            _check_weights(step, spec.steps[step], name, step_spec.of)
        found.append(name)
    return [name for name in spec.steps if name in found]


def _behind(spec: ChainSpec, order: Sequence[str]) -> dict[str, str]:
    first: dict[str, str] = {}
    found: dict[str, str] = {}
    for name in order:
        step: Any = spec.steps[name]
        of: Any = getattr(step, "of", step)
        if isinstance(of, SelectSpec):
            maker = first.setdefault(of.pool.model_dump_json(), name)
            found |= {name: maker} if maker != name else {}
    return found


def _check_weights(step: str, spec: Any, source: str, proxies: Any) -> None:
    """Check that a step has the data sets of the sweep's proxies, which find their weights.

    Raises:
        SpecError: it has others.
    """
    from stillhouse.pipelines.found_weights import data_names

    there, here = data_names(proxies), data_names(getattr(spec, "of", spec))
    if there != here:
        raise SpecError(
            f"`steps.{step}`: `from: {source}` in `weight`: the sweep finds weights of {there}, in "
            f"this order; `data` are {here}"
        )


def run_spec(spec: AnySpec, shown: Listener) -> dict[str, Any]:
    """Run a chain or any other job; the object that `run --json` prints.

    Raises:
        StillhouseError: whatever stopped it; finished parts stay, run again to go on.
    """
    if not isinstance(spec, ChainSpec):
        run = runnable(spec)
        return run.finished() or run.start(shown)
    chain = ChainRun(spec, shown)
    return chain.finished() or chain.start()


def runnable(spec: Spec | SweepSpec) -> Runnable:
    """A job that is no chain, about to run."""
    return SweepRun(spec) if isinstance(spec, SweepSpec) else JobRun(spec)


def list_spec(spec: AnySpec) -> "Job | Chain":
    """Check what a spec names and list its inputs, as far as they are there."""
    if isinstance(spec, ChainSpec):
        return Chain(spec).list_inputs()
    of: Any = spec.of if isinstance(spec, SweepSpec) else spec
    return list_job(of)


class ChainRun:
    """A chain that is about to run.

    Raises:
        StillhouseError: as `Chain`, and as `JobRun` for steps whose inputs are there.
    """

    def __init__(self, spec: ChainSpec, shown: Listener) -> None:
        self.spec = spec
        self._worker_env = worker_environment(spec)
        self._chain = Chain(spec)

        def prepare(name: str, runs: Mapping[str, str]) -> Runnable:
            return runnable(spec.step(name, runs))

        chain = self._chain
        self._steps = Steps(chain.order, chain.needs, prepare, shown, chain.behind)
        self._steps.find_ready()
        self._store = Store(check_store(spec.store))
        self._record = RunRecord(self._store, self._chain.name)

    def finished(self) -> dict[str, Any] | None:
        """The chain's result, if all steps are finished and it is of the same runs."""
        before = None if self._steps.ready else read_json(self._record.uri, "result.json")
        if before is None:
            return None
        results = self._steps.results
        runs = {name: step["run"] for name, step in before["chain"]["steps"].items()}
        if runs != {name: made.result["run"] for name, made in results.items()}:
            return None
        work = {name: {"parts": 1, "reused": 1} for name in results}
        return before | chain_numbers(results) | {"status": "nothing_to_do", "work": work}

    def start(self) -> dict[str, Any]:
        """Run the steps that are not finished; the object that `run --json` prints.

        Raises:
            StepFailedError: a step failed; `details` have the results of all that are finished.
        """
        spec, record, steps = self.spec, self._record, self._steps
        steps.record = record
        record.start(spec.to_yaml(), "chain", os.environ.get(SUBMISSION_VARIABLE), spec.name)
        with recorded(record, spec, lambda: FailedAt(next(iter(steps.failures), None))):
            if steps.ready:
                with connected(spec, self._worker_env, record):
                    steps.run_all()
            for name, error in steps.failures.items():
                raise _failed(name, error, steps.results) from error
            for name in self._chain.order:
                steps.note(name)
            needs = self._chain.needs
            result = chain_result(spec, needs, steps.results, self._store, record.uri)
        numbers = write(result)
        record.put_result(numbers)
        record.finish("done")
        return numbers


def _failed(name: str, error: Exception, results: Mapping[str, StepResult]) -> StepFailedError:
    details = chain_numbers(results)
    failed = {"status": "failed", "error": process.failure_text(error)}
    details["chain"]["steps"][name] = failed
    return step_failed(f"step `{name}`", error, details)
