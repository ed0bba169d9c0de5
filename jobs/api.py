"""Jobs from Python: what `stillhouse run` and `stillhouse plan` do, in the caller's process."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from stillhouse.jobs.chain_spec import AnySpec
from stillhouse.jobs.process import extra_named
from stillhouse.jobs.spec_file import load_spec, parse_spec
from stillhouse.pipelines.context import Listener

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
    with extra_named():
        from stillhouse.jobs.chain import run_spec

        return run_spec(_read(spec), _Events(on_event) if on_event else Listener())


def plan(spec: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    """What `run` would find finished, and what the rest would cost. Nothing is computed or written.

    Args:
        spec: as for `run`.

    Returns:
        What `stillhouse plan --json` prints.

    Raises:
        StillhouseError: the spec is wrong, or something that it names does not exist.
    """
    with extra_named():
        from stillhouse.jobs.chain_plan import plan_spec

        return plan_spec(_read(spec))


def _read(spec: Mapping[str, Any] | str | Path) -> AnySpec:
    if isinstance(spec, Mapping):
        return parse_spec({**spec}, "spec")
    return load_spec(os.fspath(spec), [])


class _Events(Listener):
    """Passes every event on as a plain dictionary."""

    def __init__(self, on_event: OnEvent) -> None:
        self._on_event = on_event

    def begin(self, step: str, total: int, reused: int, unit: str) -> None:
        self.note("step", {"step": step, "parts": total, "reused": reused, "unit": unit})

    def advance(self, step: str, done: float, amount: float) -> None:
        self.note("progress", {"step": step, "done": done, "amount": amount})

    def end(self, step: str, seconds: float) -> None:
        self.note("step done", {"step": step, "seconds": seconds})

    def note(self, kind: str, content: dict[str, Any]) -> None:
        self._on_event({"kind": kind, **content})
