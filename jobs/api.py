"""Jobs from Python: what `stillhouse run` and `stillhouse plan` do, in the caller's process."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from stillhouse.jobs.guarded import extras_named
from stillhouse.jobs.kinds import Spec
from stillhouse.jobs.spec_file import load_spec, parse_spec

OnEvent: TypeAlias = Callable[[dict[str, Any]], None]


def run(spec: Mapping[str, Any] | str | Path, on_event: OnEvent | None = None) -> dict[str, Any]:
    """Run a job to its end, or find that there is nothing to do.

    A Ray that this process is connected to is used; else one is started or joined (RAY_ADDRESS)
    and left at the end.

    Args:
        spec: the content of a spec, or the path or URI of its YAML file.
        on_event: called with each event, from the thread that calls `run`. Its `kind` is `step`
            (`step`, `parts`, `reused`, `unit`), `progress` (`step`, `done` parts and `amount` of
            the unit since the last), `step done` (`step`, `seconds`), or that of a note.

    Returns:
        What `stillhouse run --json` prints.

    Raises:
        StillhouseError: whatever stopped it. Call again with the same spec to go on.
    """
    with extras_named():
        from stillhouse.jobs.run import run_job

        return run_job(_read(spec), _Events(on_event or _ignore))


def plan(spec: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    """What `run` would find finished, and what the rest would cost. Nothing is computed or written.

    Args:
        spec: as for `run`.

    Returns:
        What `stillhouse plan --json` prints.

    Raises:
        StillhouseError: the spec is wrong, or something that it names is not there.
    """
    with extras_named():
        from stillhouse.jobs.plan import plan_job

        return plan_job(_read(spec))


def _read(spec: Mapping[str, Any] | str | Path) -> Spec:
    if isinstance(spec, Mapping):
        return parse_spec({**spec}, "spec")
    return load_spec(os.fspath(spec), [])


def _ignore(event: dict[str, Any]) -> None:
    pass


class _Events:
    """A listener that hands on everything as plain dictionaries."""

    def __init__(self, on_event: OnEvent) -> None:
        self._on_event = on_event

    def begin(self, step: str, total: int, reused: int, unit: str) -> None:
        """A step starts."""
        event = {"step": step, "parts": total, "reused": reused, "unit": unit}
        self._on_event({"kind": "step", **event})

    def advance(self, step: str, done: float, amount: float) -> None:
        """More of a step is finished."""
        self._on_event({"kind": "progress", "step": step, "done": done, "amount": amount})

    def end(self, step: str, seconds: float) -> None:
        """A step is complete."""
        self._on_event({"kind": "step done", "step": step, "seconds": seconds})

    def note(self, kind: str, content: dict[str, Any]) -> None:
        """Anything else."""
        self._on_event({"kind": kind, **content})
