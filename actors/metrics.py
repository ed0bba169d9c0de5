"""Metrics that a job exports for Prometheus by `ray.util.metrics`.

Ray writes `ray_` before a name and `_total` behind a counter's; each node serves its own at
`http://NODE:MetricsExportPort/metrics`. Reused parts are not counted. A step's name is split for
its labels: `score prior` is the step `score` of the model `prior`.
"""

import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from time import sleep
from typing import Any, Literal

_STEP = ("run", "step", "model")
_BOUNDARIES = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0]
_RUN_DIGITS = 12
_REPEAT_S = 1.0
"""Ray's shortest interval between two exports."""


@dataclass(frozen=True, slots=True)
class Metric:
    """Declaration of a metric."""

    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    about: str


METRICS = {
    "stillhouse_parts": Metric("counter", _STEP, "Parts done"),
    "stillhouse_parts_expected": Metric("gauge", _STEP, "Parts that the step has to do"),
    "stillhouse_parts_in_flight": Metric("gauge", ("run",), "Parts being worked on"),
    "stillhouse_tokens": Metric("counter", _STEP, "Tokens done"),
    "stillhouse_part_seconds": Metric("histogram", _STEP, "Seconds that one part took"),
    "stillhouse_data_wait_seconds": Metric("counter", _STEP, "Seconds waited for data"),
    "stillhouse_retries": Metric(
        "counter",
        ("run", "reason"),
        "Parts whose worker (program) or node (hardware) died",
    ),
    "stillhouse_dead_letters": Metric("gauge", ("run", "source"), "Input rows that are unusable"),
}


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """Records metrics of one step of a run, where Ray is running; picklable."""

    run: str
    step: str = ""

    def expect(self, parts: float) -> None:
        _gauges.set("stillhouse_parts_expected", self._labels(), parts)

    def advance(self, parts: float, tokens: float) -> None:
        _add("stillhouse_parts", self._labels(), parts)
        _add("stillhouse_tokens", self._labels(), tokens)

    def part(self, seconds: float, waited_s: float) -> None:
        """A worker finished a part, and waited `waited_s` for its data."""
        if _has_ray():
            _metric("stillhouse_part_seconds").observe(seconds, dict(self._labels()))
        _add("stillhouse_data_wait_seconds", self._labels(), waited_s)

    def in_flight(self, parts: int) -> None:
        _gauges.set("stillhouse_parts_in_flight", self._run(), parts)

    def retry(self, reason: str) -> None:
        """A part is repeated; `reason` is `program` or `hardware`."""
        _add("stillhouse_retries", self._run() | {"reason": reason}, 1)

    def dead_letters(self, source: str, rows: int) -> None:
        _gauges.set("stillhouse_dead_letters", self._run() | {"source": source}, rows)

    def forget(self) -> None:
        """Stop exporting the gauges of the run, which has ended."""
        _gauges.forget(self._run()["run"])

    def _run(self) -> dict[str, str]:
        return {"run": self.run[:_RUN_DIGITS]}

    def _labels(self) -> dict[str, str]:
        step, _, model = self.step.partition(" ")
        return self._run() | {"step": step, "model": model}


def _has_ray() -> bool:
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def _add(name: str, labels: Mapping[str, str], amount: float) -> None:
    if amount > 0 and _has_ray():
        _metric(name).inc(float(amount), dict(labels))


class _Gauges:
    """The gauges of this process, recorded every second while their runs last.

    A node drops a gauge from its export 20 seconds after it was last recorded.
    """

    def __init__(self) -> None:
        self._values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def set(self, name: str, labels: Mapping[str, str], value: float) -> None:
        if not _has_ray():
            return
        with self._lock:
            self._values[name, tuple(labels.items())] = float(value)
            if self._thread is None:
                self._thread = threading.Thread(target=self._repeat, daemon=True)
                self._thread.start()
        _metric(name).set(float(value), dict(labels))

    def forget(self, run: str) -> None:
        with self._lock:
            self._values = {k: v for k, v in self._values.items() if ("run", run) not in k[1]}

    def _repeat(self) -> None:
        while True:
            sleep(_REPEAT_S)
            with self._lock:
                if not self._values or not _has_ray():
                    self._values, self._thread = {}, None
                    return
                values = list(self._values.items())
            for (name, labels), value in values:
                _metric(name).set(value, dict(labels))


_gauges = _Gauges()


@cache
def _metric(name: str) -> Any:
    from ray.util import metrics

    kind, about, labels = METRICS[name].kind, METRICS[name].about, METRICS[name].labels
    if kind == "histogram":
        return metrics.Histogram(name, about, _BOUNDARIES, labels)
    return (metrics.Counter if kind == "counter" else metrics.Gauge)(name, about, labels)
