"""A job with `sweep`: its variants run side by side, each an ordinary run found again by content.

The result is that of the chosen variant, with the key `sweep` beside its own. A variant that fails
is recorded, and the others go on.
"""

import math
import os
from collections.abc import Mapping
from typing import Any

import stillhouse.report.blocks as b
from stillhouse.errors import SpecError, require
from stillhouse.fingerprint import fingerprint
from stillhouse.jobs import process
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
from stillhouse.jobs.sweep_record import Budget, Decisions
from stillhouse.jobs.sweep_spec import SweepRange, SweepSpec, Value
from stillhouse.pipelines.context import Context, FailedAt, Listener, StepWork
from stillhouse.pipelines.results import assemble, cost_numbers
from stillhouse.report.formatting import decimals
from stillhouse.report.page import write
from stillhouse.spec import NOT_IDENTITY
from stillhouse.storage.artifact import Store
from stillhouse.storage.commit import check_store
from stillhouse.storage.run_record import RunRecord, now, read_json

SWEEP_VERSION = 1
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
        if self.search == "optuna":
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
        self._jobs: dict[str, JobRun] = {}
        self._steps = Steps([], {}, self._prepare, Listener(), keep_going=True)
        if spec.sweep.search != "optuna":
            self._steps.order = [name for name in self._sweep.variants if self._pays(name)]
            if not self._steps.order:
                raise SpecError(
                    f"`sweep.max_flops: {spec.sweep.max_flops:g}` pays for no variant (see "
                    "`stillhouse plan`)"
                )
            self._steps.find_ready()

    def finished(self) -> dict[str, Any] | None:
        """The result of the chosen variant, if the sweep ended with the runs that are there."""
        before = read_json(self._record.uri, "result.json")
        if before is None or self._steps.ready:
            return None
        rows = [one for one in before["sweep"]["variants"] if one["run"]]
        results = [made.result for made in self._steps.results.values()]
        if self.spec.sweep.search == "optuna":
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
                if spec.sweep.search == "optuna":
                    self._ask_and_tell()
                elif steps.ready:
                    steps.run_all()
            for name in steps.results:
                steps.note(name)
            result, run = self._result()
            numbers = write(result) | {"run": run}
        record.put_result(numbers)
        record.finish("done")
        return numbers | self._published(numbers)

    def _prepare(self, name: str, _: Mapping[str, str] | None = None) -> Runnable:
        if name not in self._jobs:
            self._jobs[name] = JobRun(self._sweep.checked(self._sweep.variants[name]))
        return self._jobs[name]

    def _pays(self, name: str) -> bool:
        self._prepare(name)  # reads the inputs that a plan would take for new
        return self._budget.pays(self._sweep.checked(self._sweep.variants[name]))

    def _ask_and_tell(self) -> None:
        """Run variants one after another, each proposed by optuna from those before it."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sweep = self.spec.sweep
        sampler = optuna.samplers.TPESampler(seed=sweep.seed, n_startup_trials=_STARTUP)
        direction = "minimize" if sweep.mode == "min" else "maximize"
        study = optuna.create_study(sampler=sampler, direction=direction)
        for _ in range(sweep.max_runs or 0):
            trial = study.ask()
            values = {key: _suggested(trial, key, of) for key, of in sweep.over.items()}
            name = self._sweep.add(values)
            pays = self._pays(name)
            self._decisions.write()
            if not pays:
                del self._sweep.variants[name]
                break
            self._steps.order = [*self._steps.order, name]
            self._steps.find_ready()
            if self._steps.ready:
                self._steps.run_all()
            made = self._steps.results.get(name)
            failed = optuna.trial.TrialState.FAIL
            if made is None:
                study.tell(trial, state=failed)
            else:
                study.tell(trial, self._metric(made.result))

    def _metric(self, result: Mapping[str, Any]) -> float:
        """The metric of a finished variant.

        Raises:
            SpecError: its result has no such number.
        """
        node: Any = result
        path = self.spec.sweep.metric.split(".")
        for depth, key in enumerate(path):
            known = isinstance(node, Mapping) and key in node
            if not known:
                place = ".".join(path[:depth])
                there = ", ".join(node) if isinstance(node, Mapping) else type(node).__name__
                raise SpecError(
                    f"`sweep.metric: {self.spec.sweep.metric}`: "
                    f"{f'`{place}`' if place else 'the result'} has no `{key}`; it has: {there}"
                )
            node = node[key]
        if isinstance(node, bool) or not isinstance(node, int | float) or not math.isfinite(node):
            raise SpecError(f"`sweep.metric: {self.spec.sweep.metric}` is {node!r}, no number")
        return float(node)

    def _result(self) -> tuple[b.Result, str]:
        """The sweep's result, and the run of the chosen variant."""
        steps, sweep, variants = self._steps, self.spec.sweep, self._sweep.variants
        for name, error in steps.failures.items():
            if not steps.results:
                text = f"all {len(steps.failures)} variants failed, first {variants[name]}"
                raise step_failed(text, error, {}) from error
        found = {name: self._metric(made.result) for name, made in steps.results.items()}
        best = (min if sweep.mode == "min" else max)(found, key=lambda name: found[name])
        chosen = steps.results[best].result
        rows = [
            {
                "values": values,
                "status": self._status(name),
                "metric": found.get(name),
                "run": steps.results[name].result["run"] if name in found else None,
                "error": process.failure_text(steps.failures[name])
                if name in steps.failures
                else None,
            }
            for name, values in variants.items()
        ]
        numbers = {key: value for key, value in chosen.items() if key not in _OWN}
        numbers["sweep"] = {
            "run": self._record.uri,
            "metric": sweep.metric,
            "mode": sweep.mode,
            "variants": rows,
            "chosen": rows[[*variants].index(best)],
        }
        ctx = Context(self._store, self.spec.compute, Listener())
        ctx.work = {name: steps.results[name].work for name in variants if name in found}
        ctx.work |= {name: StepWork(parts=1) for name in steps.failures}
        result = assemble(
            ctx,
            self.spec,
            chosen["job"],
            self._record.uri,
            title=f"{sweep.metric} over {', '.join(sweep.over)}",
            artifacts=chosen["artifacts"],
            numbers=numbers | {"cost": cost_numbers(ctx.work)},
            warnings=self._warnings(found),
            lead=[b.Facts(self._tiles(best, found), terminal=True)],
            sections=[b.Section("variants", "Variants", [*self._charts(best, found)])],
            footer="The metric of the chosen variant was used to choose it: where variants are "
            "close, measure it again on text that was not looked at.",
        )
        return result, chosen["run"]

    def _status(self, name: str) -> str:
        made = self._steps.results.get(name)
        if made is not None:
            return made.status
        return "failed" if name in self._steps.failures else "left out"

    def _warnings(self, found: Mapping[str, float]) -> b.Warnings:
        failed = [
            b.Warn(f"{self._sweep.variants[name]} failed", process.failure_text(error))
            for name, error in self._steps.failures.items()
        ]
        variants = self._sweep.variants
        edges = [
            b.Warn(
                f"`{key}`: the best value is at the edge of those tried",
                "A better one may lie outside: widen `sweep.over`.",
            )
            for key in self.spec.sweep.over
            if self._at_edge(key, {name: variants[name][key] for name in found}, found)
        ]
        return b.Warnings(
            [*failed, *edges], "Failures, and best values at the edge, were looked for."
        )

    def _at_edge(self, key: str, values: Mapping[str, Value], found: Mapping[str, float]) -> bool:
        numbers = {n: v for n, v in values.items() if isinstance(v, int | float)}
        if len({*numbers.values()}) < 3:
            return False
        best = (min if self.spec.sweep.mode == "min" else max)(found, key=lambda n: found[n])
        return values[best] in (min(numbers.values()), max(numbers.values()))

    def _tiles(self, best: str, found: Mapping[str, float]) -> list[b.Fact]:
        values = ", ".join(f"{k} {_short(v)}" for k, v in self._sweep.variants[best].items())
        count = f"{len(found)} of {len(self._sweep.variants)} ran"
        return [
            b.Fact(self.spec.sweep.metric, decimals(found[best], 4), values, main=True),
            b.Fact("Variants", str(len(self._sweep.variants)), count),
        ]

    def _charts(self, best: str, found: Mapping[str, float]) -> list[b.Block]:
        """A table, and a curve for each key whose values are numbers."""
        variants, metric = self._sweep.variants, self.spec.sweep.metric
        sign = 1 if self.spec.sweep.mode == "min" else -1
        order = sorted(variants, key=lambda name: sign * found.get(name, sign * math.inf))
        rows: list[list[b.Cell]] = [
            [
                name,
                *(_short(v) for v in variants[name].values()),
                self._status(name),
                found.get(name),
            ]
            for name in order
        ]
        columns = {"variant": "text"} | dict.fromkeys(self.spec.sweep.over, "text")
        columns |= {"status": "text", metric: "decimals4"}
        blocks: list[b.Block] = [
            b.Table(columns, rows, f"Best first, by `{metric}`.", main=best, terminal=True)
        ]
        for key in self.spec.sweep.over:
            values = {name: variants[name][key] for name in found}
            points = [
                (float(value), found[name])
                for name, value in values.items()
                if isinstance(value, int | float) and not isinstance(value, bool)
            ]
            if len({x for x, _ in points}) >= 3:
                curve = {metric: [sorted(points)]}
                blocks.append(b.Curves(f"By `{key}`", curve, metric, key, metric, settled_from=0.0))
        return blocks

    def _published(self, result: Mapping[str, Any]) -> dict[str, Any]:
        return publish_result(self._store, self.spec.of, {**result}, self._began)


_OWN = {"status", "job", "run", "report", "artifacts", "work", "warnings", "cost", "published"}


def _suggested(trial: Any, key: str, of: "list[Any] | SweepRange") -> Value:
    if not isinstance(of, SweepRange):
        return trial.suggest_categorical(key, of)
    if of.whole:
        return trial.suggest_int(key, int(of.min), int(of.max))
    return trial.suggest_float(key, of.min, of.max, log=of.log)


def _short(value: Value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
