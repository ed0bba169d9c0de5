"""A job with `sweep`: its variants run side by side, each an ordinary run found again by content.

The result is that of the chosen variant, with the key `sweep` beside its own. A variant that fails
is recorded, and the others go on.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from stillhouse.errors import SpecError, StoppedEarlyError, require
from stillhouse.fingerprint import fingerprint
from stillhouse.jobs.publish import check_name, publish_result
from stillhouse.jobs.run import (
    SUBMISSION_VARIABLE,
    JobRun,
    connected,
    recorded,
    worker_environment,
)
from stillhouse.jobs.spec_file import parse_spec
from stillhouse.jobs.steps import Runnable, Steps, step_failed
from stillhouse.jobs.sweep_mixture import FoundMixture, Proxies, equal_shares, values_of
from stillhouse.jobs.sweep_outcome import Outcome, metric_of
from stillhouse.jobs.sweep_record import Budget, Decisions
from stillhouse.jobs.sweep_result import SweepReport
from stillhouse.jobs.sweep_spec import SweepRange, SweepSettings, SweepSpec, Value
from stillhouse.jobs.sweep_stop import Stopper, Watched, stopped_early
from stillhouse.pipelines.context import FailedAt, Listener
from stillhouse.report.page import write
from stillhouse.spec import NOT_IDENTITY
from stillhouse.storage.artifact import Store
from stillhouse.storage.commit import check_store
from stillhouse.storage.run_record import RunRecord, now, read_json

SWEEP_VERSION = 2
_METRIC = "metric"
_STARTUP = 5  # random variants before optuna's model


class Sweep:
    """The variants of a sweep, all checked.

    Raises:
        SpecError: a key or a value that the job does not take, or a budget that pays for no run.
    """

    def __init__(self, spec: SweepSpec) -> None:
        self.spec = spec
        self.search = spec.sweep.search
        self.variants: dict[str, dict[str, Value]] = {}
        if spec.sweep.mixture is not None:
            require("sklearn")
            self.add(equal_shares(spec))
        elif self.search == "optuna":
            require("optuna")
            self.checked(spec.sweep.drawn([0.0] * len(spec.sweep.over)))
        else:
            for values in spec.sweep.variants():
                self.add(values)

    def add(self, values: dict[str, Value]) -> str:
        """Add a variant; its name."""
        self.checked(values)
        name = f"{len(self.variants) + 1:03d}"
        self.variants[name] = values
        return name

    def checked(self, values: Mapping[str, Value]) -> Any:
        """The spec of a variant."""
        return parse_spec(self.spec.variant(values), f"`sweep.over` {dict(values)}")

    @property
    def name(self) -> str:
        """The fingerprint of the sweep: of job and variants as they are written."""
        of = self.spec.of.model_dump(mode="json", exclude=NOT_IDENTITY, exclude_unset=True)
        sweep = self.spec.sweep.model_dump(mode="json", exclude_unset=True)
        return fingerprint(["sweep", SWEEP_VERSION, of, sweep])


class SweepRun:
    """A sweep that is about to run, as `JobRun` is of a job."""

    def __init__(self, spec: SweepSpec) -> None:
        self.spec = spec
        self._worker_env = worker_environment(spec)
        self._began = now()
        self._sweep = Sweep(spec)
        self._store = Store(check_store(spec.store))
        check_name(self._store, spec.of)
        self._record = RunRecord(self._store, self._sweep.name)
        self._decisions = Decisions(self._record.uri)
        self._budget = Budget(spec.sweep.max_flops, self._decisions)
        self._stopper = None
        if spec.sweep.stop is not None:
            self._stopper = Stopper(spec, self._store, self._decisions)
        self._jobs: dict[str, JobRun] = {}
        self._steps = Steps([], {}, self._prepare, Listener(), keep_going=True)
        if spec.sweep.search != "optuna":
            self._steps.order = [name for name in self._sweep.variants if self._pays(name)]
            if not self._steps.order:
                raise SpecError(
                    f"`sweep.max_flops: {spec.sweep.max_flops:g}` pays for no variant (see "
                    "`stillhouse plan`)"
                )
            self._find_ready()

    def finished(self) -> dict[str, Any] | None:
        """The result of the chosen variant, if the sweep ended with the runs that are there."""
        before = read_json(self._record.uri, "result.json")
        if before is None or self._steps.ready:
            return None
        rows = [one for one in before["sweep"]["variants"] if one["metric"] is not None]
        results = [made.result for made in self._steps.results.values()]
        if self.spec.sweep.goes_on:
            jobs = [JobRun(self._sweep.checked(one["values"])) for one in rows]
            results = [result for job in jobs if (result := job.finished()) is not None]
        if {one["run"] for one in results} != {one["run"] for one in rows}:
            return None
        return before | {"status": "nothing_to_do"} | self._published(before)

    def start(self, shown: Listener) -> dict[str, Any]:
        """Run the variants that are not finished; the object that `run --json` prints.

        Raises:
            StepFailedError: every variant failed. SpecError: no such metric.
        """
        spec, record, steps = self.spec, self._record, self._steps
        steps.record, steps.shown = record, shown
        record.start(spec.to_yaml(), "sweep", os.environ.get(SUBMISSION_VARIABLE), spec.name)
        with recorded(record, spec, lambda: FailedAt(next(iter(steps.failures), None))):
            self._decisions.write()
            with connected(spec, self._worker_env, record):
                mixture = None
                if spec.sweep.search == "optuna":
                    self._ask_and_tell()
                elif steps.ready:
                    steps.run_all()
                if spec.sweep.mixture is not None:
                    mixture = self._find_mixture()
            for name in steps.results:
                steps.note(name)
            report = SweepReport(spec, self._outcomes(), mixture)
            numbers = write(report.result(self._store, record.uri, self._decisions))
            if mixture is None:  # else its result is more than the chosen run's
                numbers |= {"run": steps.results[report.best].result["run"]}
        record.put_result(numbers)
        record.finish("done")
        return numbers | self._published(numbers)

    def _prepare(self, name: str, _: Mapping[str, str] | None = None) -> Runnable:
        if name not in self._jobs:
            self._jobs[name] = JobRun(self._sweep.checked(self._sweep.variants[name]))
        job = self._jobs[name]
        return job if self._stopper is None else Watched(job, self._stopper)

    def _find_ready(self) -> None:
        """Find the variants to run; those that the sweep stopped are not run again."""
        steps, stopped = self._steps, self._decisions.stopped
        steps.find_ready()
        for name, job in self._jobs.items():
            if job.name in stopped and name not in steps.failures:
                steps.ready.pop(name, None)
                steps.results.pop(name, None)  # finished by hand since then
                steps.failures[name] = stopped_early(stopped[job.name])
            elif self._stopper is not None and name in steps.results:
                self._stopper.add_finished(job.name, steps.results[name].result)

    def _pays(self, name: str) -> bool:
        self._prepare(name)  # reads the inputs that a plan would take for new
        return self._budget.pays(self._sweep.checked(self._sweep.variants[name]))

    def _ask_and_tell(self) -> None:
        """Run variants one after another, each proposed by optuna from those before it."""
        search = optuna_search(self.spec.sweep)
        for _ in range(self.spec.sweep.max_runs or 0):
            trial = str(len(self._sweep.variants))
            name = self._sweep.add(search.suggest(trial))
            self._run_more([name])
            outcome = self._outcome(name)
            if outcome.status == "left out":
                del self._sweep.variants[name]
                break
            result = None if outcome.metric is None else {_METRIC: outcome.metric}
            search.on_trial_complete(trial, result, error=outcome.status == "failed")

    def _find_mixture(self) -> FoundMixture:
        """Run the proxies once the first one has told how many tokens there are, fit, and try.

        Raises:
            StepFailedError: the first one failed. SpecError: as `Proxies`.
        """
        [first] = self._outcomes().values()
        assert first.made is not None
        proxies = Proxies(self.spec, first.made.result)
        self._run_more([self._sweep.add(values) for values in proxies.drawn()])
        ran = {name: one for name, one in self._outcomes().items() if one.metric is not None}
        fit = proxies.fit([(one.values, one.metric or 0.0) for one in ran.values()])
        edge = proxies.at_edge(fit.shares, [one.values for one in ran.values()])
        self._run_more([self._sweep.add(values_of(fit.shares))])
        return proxies.found(fit, self._outcomes(), edge)

    def _run_more(self, names: Sequence[str]) -> None:
        """Run variants that the budget pays for."""
        paid = [name for name in names if self._pays(name)]
        self._decisions.write()
        self._steps.order = [*self._steps.order, *paid]
        self._find_ready()
        if self._steps.ready:
            self._steps.run_all()

    def _outcome(self, name: str) -> Outcome:
        """How a variant that is not running stands."""
        values, steps = self._sweep.variants[name], self._steps
        made, error = steps.results.get(name), steps.failures.get(name)
        if made is None and error is None:
            return Outcome(values, "left out")
        job = self._jobs[name].name
        run = self._store.path("runs", job)
        if made is not None:
            metric, test = metric_of(made.result, self.spec.sweep.metric)
            return Outcome(values, made.status, run, made, metric, test)
        if isinstance(error, StoppedEarlyError):
            return Outcome(values, "stopped", run, stopped_at=self._decisions.stopped[job])
        return Outcome(values, "failed", run, error=error)

    def _outcomes(self) -> dict[str, Outcome]:
        """How the variants stand, by name.

        Raises:
            StepFailedError: none of them has a result.
        """
        steps, variants = self._steps, self._sweep.variants
        if not steps.results:
            errors = steps.failures
            failed = [n for n, e in errors.items() if not isinstance(e, StoppedEarlyError)]
            name = (failed or [*errors])[0]
            text = "the only variant" if len(errors) == 1 else f"all {len(errors)} variants"
            text += " failed"
            if len(failed) < len(errors):
                text += f" or were stopped ({len(errors) - len(failed)})"
            raise step_failed(f"{text}, first {variants[name]}", errors[name], {}) from errors[name]
        return {name: self._outcome(name) for name in variants}

    def _published(self, result: Mapping[str, Any]) -> dict[str, Any]:
        return publish_result(self._store, self.spec.of, {**result}, self._began)


def optuna_search(sweep: SweepSettings) -> Any:
    """The searcher of Ray Tune; asked and told by hand, as a variant is a run and no Tune trial."""
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    def space(trial: Any) -> None:
        for key, of in sweep.over.items():
            if not isinstance(of, SweepRange):
                trial.suggest_categorical(key, of)
            elif of.whole:
                trial.suggest_int(key, int(of.min), int(of.max))
            else:
                trial.suggest_float(key, of.min, of.max, log=of.log)

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=sweep.seed, n_startup_trials=_STARTUP)
    return OptunaSearch(space=space, metric=_METRIC, mode=sweep.mode, sampler=sampler)
