"""What a person sees while a job runs: bars on a terminal, plain lines otherwise, or nothing."""

import sys
import time
from typing import Any

from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from stillhouse.report.terminal import Terminal, plain

_INTERVAL_S = 10.0
_NOUNS = {"steps": "runs", "iterations": "sets"}
"""What the parts of a step are, by the unit of its rate, where they have a name of their own."""
_SHOWN = {"waiting", "recipe"}
"""Kinds of notes: why nothing goes on, and how models are trained."""


def rate(amount: float, seconds: float, unit: str) -> str:
    """`1.2 M tokens/s`."""
    value = amount / seconds if seconds > 0 else 0.0
    for limit, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * limit:  # 999.6 is 1.0 k
            return f"{value / limit:.1f} {prefix} {unit}/s"
    return f"{value:.3g} {unit}/s"


class Bars:
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
        self._tasks: dict[str, tuple[TaskID, str, float]] = {}
        self._amounts: dict[str, float] = {}
        self._progress.start()

    def begin(self, step: str, total: int, reused: int, unit: str) -> None:
        """A bar appears; what was found finished is filled in."""
        detail = f"{reused} of {total} reused" if reused else ""
        task = self._progress.add_task(
            plain(step), total=max(total, 1), completed=reused, detail=detail
        )
        self._tasks[step] = (task, unit, time.perf_counter())
        self._amounts[step] = 0.0

    def advance(self, step: str, done: float, amount: float) -> None:
        """The bar moves, the rate is shown."""
        task, unit, started = self._tasks[step]
        self._amounts[step] += amount
        shown = rate(self._amounts[step], time.perf_counter() - started, unit)
        self._progress.update(task, advance=done, detail=shown)

    def end(self, step: str, seconds: float) -> None:
        """The bar is full."""
        task = self._tasks[step][0]
        self._progress.update(task, completed=self._progress.tasks[task].total)

    def note(self, kind: str, content: dict[str, Any]) -> None:
        """Notes go to the run's events; some are for people too."""
        if kind in _SHOWN:
            self._progress.console.print(f"{kind}: {content['message']}")

    def close(self) -> None:
        """Leave the bars on the screen."""
        self._progress.stop()


class Lines:
    """A line when a step begins and ends and every ten seconds between, for logs."""

    def __init__(self) -> None:
        self._steps: dict[str, list[Any]] = {}

    def begin(self, step: str, total: int, reused: int, unit: str) -> None:
        """Say what is to be done."""
        now = time.perf_counter()
        self._steps[step] = [total, float(reused), 0.0, unit, now, now]
        self._say(f"{step}: {total} {_NOUNS.get(unit, 'parts')}, {reused} reused")

    def advance(self, step: str, done: float, amount: float) -> None:
        """Say how far it is, not more often than every ten seconds."""
        state = self._steps[step]
        state[1] += done
        state[2] += amount
        now = time.perf_counter()
        if now - state[5] >= _INTERVAL_S:
            state[5] = now
            unit, noun = state[3], _NOUNS.get(state[3], "parts")
            shown = rate(state[2], now - state[4], unit)
            self._say(f"{step}: {state[1]:.1f} of {state[0]} {noun}, {shown}")

    def end(self, step: str, seconds: float) -> None:
        """Say how long it took."""
        self._say(f"{step}: done in {seconds:.1f} s")

    def note(self, kind: str, content: dict[str, Any]) -> None:
        """Notes go to the run's events; some are for people too."""
        if kind in _SHOWN:
            self._say(f"{kind}: {content['message']}")

    def close(self) -> None:
        """Nothing to close."""

    def _say(self, text: str) -> None:
        print(plain(text), file=sys.stderr, flush=True)


def listener(quiet: bool) -> Bars | Lines:
    """Bars on a terminal, else lines on stderr (stdout belongs to `--json`)."""
    console = Terminal(stderr=True)
    return Bars(console) if console.is_terminal and not quiet else Lines()
