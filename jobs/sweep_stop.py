"""Early stopping of a sweep's variants, decided by a scheduler of Ray Tune.

Ray Tune's own loop runs trials in actors of its own; a variant is an ordinary run, so the scheduler
is given the evaluations of the variants as they come, and answers which ones go on. What it answers
depends on the order in which they come. That order is in the sweep's record: a sweep that runs
again gives the scheduler the same evaluations first, and stopped variants stay stopped.
"""

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stillhouse.errors import StoppedEarlyError
from stillhouse.jobs.run import JobRun
from stillhouse.jobs.sweep_outcome import CHOSEN_ON
from stillhouse.jobs.sweep_record import Decisions
from stillhouse.jobs.sweep_spec import CURVES, SweepSpec
from stillhouse.pipelines.context import Listener, PassingOn
from stillhouse.spec import JobSpec
from stillhouse.storage.artifact import Store

_TIME, _VALUE = "evaluation", "value"


@dataclass(frozen=True, slots=True)
class _Trial:
    """What the schedulers need of a trial; named by the fingerprint of the variant's run."""

    trial_id: str


class _NoOthers:
    """Stands for Tune's controller: no trial waits for another one's place."""

    def get_live_trials(self) -> list[Any]:
        return []


class Stopper:
    """Decides after every evaluation whether a variant goes on; called from any thread.

    Evaluations are counted from 1 to `train.eval_points`. The last one stops nothing.
    """

    def __init__(self, spec: SweepSpec, store: Store, decisions: Decisions) -> None:
        self._store, self._decisions = store, decisions
        self._num_evaluations, self._key = spec.num_evaluations, CURVES[spec.sweep.metric]
        self._scheduler, self._lock = _scheduler(spec), threading.Lock()
        self._seen: dict[str, int] = {}
        for entry in decisions.evaluations:
            self._ask(entry)

    def add_finished(self, run: str, result: Mapping[str, Any]) -> None:
        """Tell the scheduler of a variant that was finished before the sweep saw it."""
        if run in self._seen:
            return
        totals = self._store.get_manifest("models", result["model_fingerprint"]).totals
        for content in totals["evaluations"]:
            entry = self._entry(run, {**content, "num_steps": totals["num_steps"]})
            self._ask(entry)
            self._decisions.add(entry | {"stop": False})

    def on_evaluation(self, run: str, content: Mapping[str, Any]) -> None:
        """Take an evaluation of a running variant.

        Raises:
            StoppedEarlyError: the variant is to end.
        """
        entry = self._entry(run, content)
        with self._lock:
            if entry[_TIME] <= self._seen.get(run, 0) or not math.isfinite(entry[_VALUE]):
                return  # an evaluation that is repeated after a kill
            entry["stop"] = self._ask(entry)
            self._decisions.add(entry)
            self._decisions.write()
        if entry["stop"]:
            raise stopped_early(entry)

    def _entry(self, run: str, content: Mapping[str, Any]) -> dict[str, Any]:
        number = round(content["step"] * self._num_evaluations / content["num_steps"])
        halves = content.get("halves")
        value = float(halves[CHOSEN_ON]["nll"] if halves else content[self._key])
        entry = {"run": run, _TIME: number, "step": content["step"], _VALUE: value}
        return entry | ({"cost": content["cost"]} if "cost" in content else {})

    def _ask(self, entry: Mapping[str, Any]) -> bool:
        """Whether the scheduler stops a variant after an evaluation."""
        run, number = entry["run"], entry[_TIME]
        trial, scheduler = _Trial(run), self._scheduler
        if run not in self._seen:
            scheduler.on_trial_add(_NoOthers(), trial)
        self._seen[run] = number
        result = {_TIME: number, _VALUE: entry[_VALUE]}
        if number >= self._num_evaluations:
            scheduler.on_trial_complete(_NoOthers(), trial, result)
            return False
        return scheduler.on_trial_result(_NoOthers(), trial, result) == "STOP"


def stopped_early(entry: Mapping[str, Any]) -> StoppedEarlyError:
    """The error that ends a variant, of the entry of `Decisions` that stops it."""
    text = f"the sweep stopped it after evaluation {entry[_TIME]}, at step {entry['step']}"
    return StoppedEarlyError(text)


def _scheduler(spec: SweepSpec) -> Any:
    from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule

    stop = spec.sweep.stop
    assert stop is not None
    common: dict[str, Any] = {"time_attr": _TIME, "metric": _VALUE, "mode": spec.sweep.mode}
    common["grace_period"] = stop.grace_period
    if stop.name == "median":
        return MedianStoppingRule(min_samples_required=stop.min_samples or 3, **common)
    factor = stop.reduction_factor or 4
    last = spec.num_evaluations
    return ASHAScheduler(max_t=last, reduction_factor=factor, stop_last_trials=False, **common)


class Watched:
    """A variant whose evaluations go to a `Stopper`; a `Runnable`."""

    def __init__(self, job: JobRun, stopper: Stopper) -> None:
        self._job, self._stopper = job, stopper

    @property
    def spec(self) -> JobSpec:
        return self._job.spec

    def finished(self) -> dict[str, Any] | None:
        """As that of the job."""
        return self._job.finished()

    def start(self, shown: Listener) -> dict[str, Any]:
        """As that of the job.

        Raises:
            StoppedEarlyError: the sweep stopped it.
        """
        return self._job.start(_Watch(shown, self._stopper, self._job.name))


class _Watch(PassingOn):
    """Passes everything on, and evaluations to a `Stopper`, too."""

    def __init__(self, shown: Listener, stopper: Stopper, run: str) -> None:
        super().__init__(shown)
        self._stopper, self._run = stopper, run

    def note(self, kind: str, content: dict[str, Any]) -> None:
        super().note(kind, content)
        if kind == "train evaluation":
            self._stopper.on_evaluation(self._run, content)
