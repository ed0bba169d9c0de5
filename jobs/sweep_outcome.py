"""How a variant ended, and its metric: what variants are chosen by, and what is reported.

Where the data allow it, they are measured on different parts: a held-out loss by halves of the
held-out documents, an accuracy on the validation and the test part.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from stillhouse.errors import SpecError
from stillhouse.jobs import process
from stillhouse.jobs.steps import StepResult
from stillhouse.jobs.sweep_spec import Value
from stillhouse.pipelines.context import StepWork
from stillhouse.training.task import HALVES

CHOSEN_ON, REPORTED_ON = HALVES
_TESTED = (
    ("train.validation_accuracy", "train.accuracy"),
    ("distill.validation_accuracy", "distill.test_accuracy.mean"),
    ("mix.*.seeds.*.validation_accuracy", "accuracy"),
    ("mix.*.seeds.*.validation_nll", "heldout_nll"),
)
"""Metrics of a validation part, and the number of the test part: beside the metric, or a path."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a variant ended.

    Attributes:
        values: by key of the spec.
        status: `done`, `reused`, `stopped`, `failed` or `left out`.
        run: the URI of its run; None for one that was left out.
        made: its result, if it has one.
        metric: of a variant with a result.
        test: the same, measured on what no variant was chosen on; None where there is no such part.
        error: of one that failed.
        stopped_at: the evaluation after which it was stopped.
    """

    values: Mapping[str, Value]
    status: str
    run: str | None = None
    made: StepResult | None = None
    metric: float | None = None
    test: float | None = None
    error: Exception | None = None
    stopped_at: Mapping[str, Any] | None = None

    @property
    def shown_status(self) -> str:
        at = self.stopped_at
        return self.status if at is None else f"stopped at {at['evaluation']}"

    @property
    def work(self) -> StepWork | None:
        """What it cost, of one that was stopped its training up to there; None: not known."""
        if self.made is not None:
            return self.made.work
        cost = (self.stopped_at or {}).get("cost")
        return None if cost is None else StepWork(parts=1, **cost)

    def numbers(self) -> dict[str, Any]:
        """Its entry in `sweep.variants`."""
        at, work = self.stopped_at, self.work
        return {
            "values": dict(self.values),
            "status": self.status,
            "metric": self.metric,
            "run": self.run,
            "error": None if self.error is None else process.failure_text(self.error),
            "stopped_at": at and {key: at[key] for key in ("evaluation", "step", "value")},
            "flops": None if work is None else work.flops or None,
            "device_seconds": None if work is None else round(work.device_seconds, 3),
        }


def metric_of(result: Mapping[str, Any], path: str) -> tuple[float, float | None]:
    """What a finished variant is compared by, and the same on what nothing was chosen by.

    Args:
        result: of its run.
        path: `sweep.metric`.

    Returns:
        The second one is None where there is no such part.

    Raises:
        SpecError: the result has no such number.
    """
    found = _number_at(result, path)
    section, _, key = path.rpartition(".")
    halves = _at(result, section).get("heldout_halves") if key == "heldout_nll" else None
    if halves is not None:
        return halves[CHOSEN_ON], halves[REPORTED_ON]
    for pattern, tested in _TESTED:
        if fnmatchcase(path, pattern):
            return found, _number_at(result, tested if "." in tested else f"{section}.{tested}")
    return found, None


def _number_at(result: Mapping[str, Any], path: str) -> float:
    node = _at(result, path)
    if isinstance(node, bool) or not isinstance(node, int | float) or not math.isfinite(node):
        raise SpecError(f"`sweep.metric: {path}` is {node!r}, no number")
    return float(node)


def _at(result: Mapping[str, Any], path: str) -> Any:
    node: Any = result
    keys = path.split(".")
    for depth, key in enumerate(keys):
        if not isinstance(node, Mapping) or key not in node:
            place = ".".join(keys[:depth])
            there = ", ".join(node) if isinstance(node, Mapping) else type(node).__name__
            raise SpecError(
                f"`sweep.metric: {path}`: {f'`{place}`' if place else 'the result'} has no "
                f"`{key}`; it has: {there}"
            )
        node = node[key]
    return node
