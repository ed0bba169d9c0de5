"""Listeners of a job's events: bars on a terminal, lines for logs, the record in the store."""

import sys
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from stillhouse.pipelines.context import Listener, PassingOn
from stillhouse.report.terminal import Terminal, plain
from stillhouse.storage.run_record import RunRecord

_INTERVAL_S = 10.0
_NOUNS = {"steps": "runs", "iterations": "sets"}
"""What the parts of a step are called, by the unit of its rate; otherwise `parts`."""
_SHOWN_NOTES = {"waiting", "recipe"}


def rate(amount: float, seconds: float, unit: str) -> str:
    """`1.2 M tokens/s`."""
    value = amount / seconds if seconds > 0 else 0.0
    for limit, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * limit:  # 999.6 is 1.0 k
            return f"{value / limit:.1f} {prefix} {unit}/s"
    return f"{value:.3g} {unit}/s"


@dataclass
class _StepState:
    total: int
    unit: str
    done: float
    bar: Any = None
    amount: float = 0.0
    started: float = field(default_factory=perf_counter)
    shown: float = field(default_factory=perf_counter)

    def rate(self) -> str:
        return rate(self.amount, perf_counter() - self.started, self.unit)


class Bars(Listener):
    """A bar for each step, on a terminal."""

    def __init__(self, console: Terminal) -> None:
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description:<22}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[detail]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            console=console,
        )
        self._steps: dict[str, _StepState] = {}
        self._progress.start()

    def begin(self, step: str, total: int, reused: int, unit: str) -> None:
        detail = f"{reused} of {total} reused" if reused else ""
        bar = self._progress.add_task(
            plain(step), total=max(total, 1), completed=reused, detail=detail
        )
        self._steps[step] = _StepState(total, unit, reused, bar)

    def advance(self, step: str, done: float, amount: float) -> None:
        state = self._steps[step]
        state.amount += amount
        self._progress.update(state.bar, advance=done, detail=state.rate())

    def end(self, step: str, seconds: float) -> None:
        state = self._steps[step]
        self._progress.update(state.bar, completed=max(state.total, 1))

    def note(self, kind: str, content: dict[str, Any]) -> None:
        if kind in _SHOWN_NOTES:
            self._progress.console.print(f"{kind}: {content['message']}")

    def close(self) -> None:
        """Stop redrawing; the bars stay on the screen."""
        self._progress.stop()


class Lines(Listener):
    """A line on stderr when a step begins and ends, and every ten seconds in between."""

    def __init__(self) -> None:
        self._steps: dict[str, _StepState] = {}

    def begin(self, step: str, total: int, reused: int, unit: str) -> None:
        self._steps[step] = _StepState(total, unit, reused)
        self._print(f"{step}: {total} {_NOUNS.get(unit, 'parts')}, {reused} reused")

    def advance(self, step: str, done: float, amount: float) -> None:
        state = self._steps[step]
        state.done += done
        state.amount += amount
        if perf_counter() - state.shown >= _INTERVAL_S:
            state.shown = perf_counter()
            noun = _NOUNS.get(state.unit, "parts")
            self._print(f"{step}: {state.done:.1f} of {state.total} {noun}, {state.rate()}")

    def end(self, step: str, seconds: float) -> None:
        self._print(f"{step}: done in {seconds:.1f} s")

    def note(self, kind: str, content: dict[str, Any]) -> None:
        if kind in _SHOWN_NOTES:
            self._print(f"{kind}: {content['message']}")

    def close(self) -> None:
        pass

    def _print(self, text: str) -> None:
        print(plain(text), file=sys.stderr, flush=True)


def listener(quiet: bool) -> Bars | Lines:
    """Bars on a terminal, otherwise (and with `--json`) lines on stderr."""
    console = Terminal(stderr=True)
    return Bars(console) if console.is_terminal and not quiet else Lines()


class Recorder(PassingOn):
    """Writes the events to the run's record, and passes them on to `shown`."""

    def __init__(self, shown: Listener, record: RunRecord) -> None:
        super().__init__(shown)
        self._record = record
        self._done: dict[str, float] = {}

    def begin(self, step: str, total: int, reused: int, unit: str) -> None:
        super().begin(step, total, reused, unit)
        self._done[step] = float(reused)
        self._record.step(step, state="running", parts=total, done=reused, reused=reused)
        self._record.event("step", {"step": step, "parts": total, "reused": reused}, flush=True)

    def advance(self, step: str, done: float, amount: float) -> None:
        super().advance(step, done, amount)
        self._done[step] += done
        self._record.step(step, done=round(self._done[step], 3))
        self._record.event("progress", {"step": step, "done": done, "amount": amount})

    def end(self, step: str, seconds: float) -> None:
        super().end(step, seconds)
        self._record.step(step, state="done", seconds=round(seconds, 3))
        self._record.event("step done", {"step": step, "seconds": round(seconds, 3)})

    def note(self, kind: str, content: dict[str, Any]) -> None:
        self._record.event(kind, content)
        super().note(kind, content)
