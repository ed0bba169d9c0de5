"""A listener that also writes the run's record."""

from typing import Any

from stillhouse.pipelines.context import Listener
from stillhouse.storage.run_record import RunRecord


class Recorder:
    """Passes everything on to what a person sees, and notes it in the store."""

    def __init__(self, shown: Listener, record: RunRecord) -> None:
        self._shown = shown
        self._record = record
        self._done: dict[str, float] = {}

    def begin(self, step: str, total: int, reused: int, unit: str) -> None:
        """A step starts."""
        self._shown.begin(step, total, reused, unit)
        self._done[step] = float(reused)
        self._record.step(step, state="running", parts=total, done=reused, reused=reused)
        self._record.event("step", {"step": step, "parts": total, "reused": reused}, flush=True)

    def advance(self, step: str, done: float, amount: float) -> None:
        """More of a step is finished."""
        self._shown.advance(step, done, amount)
        self._done[step] += done
        self._record.step(step, done=round(self._done[step], 3))
        self._record.event("progress", {"step": step, "done": done, "amount": amount})

    def end(self, step: str, seconds: float) -> None:
        """A step is complete."""
        self._shown.end(step, seconds)
        self._record.step(step, state="done", seconds=round(seconds, 3))
        self._record.event("step done", {"step": step, "seconds": round(seconds, 3)})

    def note(self, kind: str, content: dict[str, Any]) -> None:
        """Anything else."""
        self._shown.note(kind, content)
        self._record.event(kind, content)
