"""What a sweep decided, kept with its record, so that the same sweep decides alike again."""

from collections.abc import Mapping
from typing import Any

from stillhouse.jobs.kinds import Spec
from stillhouse.jobs.plan import plan_job
from stillhouse.storage import numbered
from stillhouse.storage.filesystem import join, read_many
from stillhouse.storage.sealed import unseal

_FOLDER = "decisions"


class Decisions:
    """The decisions of a sweep in the order in which they were made.

    Attributes:
        entries: those in the store, then those that `add` keeps back.
    """

    def __init__(self, run_uri: str) -> None:
        self._folder = join(run_uri, _FOLDER)
        numbers = numbered.versions(self._folder)
        uris = [join(self._folder, f"{number:08d}.json") for number in numbers]
        self.entries = [unseal(data, uri) for data, uri in zip(read_many(uris), uris, strict=True)]
        self._num_stored = len(self.entries)

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Those about an evaluation of a variant: see `stillhouse.jobs.sweep_stop`."""
        return [entry for entry in self.entries if "evaluation" in entry]

    @property
    def stopped(self) -> dict[str, dict[str, Any]]:
        """The evaluations after which variants were stopped, by run."""
        return {entry["run"]: entry for entry in self.evaluations if entry["stop"]}

    def add(self, entry: Mapping[str, Any]) -> None:
        """Add a decision; `write` puts it into the store."""
        self.entries.append({**entry})

    def write(self) -> None:
        """Write what was added since the last time."""
        for entry in self.entries[self._num_stored :]:
            numbered.append(self._folder, entry)
        self._num_stored = len(self.entries)


class Budget:
    """FLOPs that the variants of a sweep may cost together.

    A variant costs what `plan` said when the sweep first looked at it: one that has run since, or
    was left out, is no cheaper and no dearer when the sweep runs again.
    """

    def __init__(self, max_flops: float | None, decisions: Decisions) -> None:
        self._left, self._decisions = max_flops, decisions
        self._prices = {e["run"]: e["flops"] for e in decisions.entries if "flops" in e}

    def pays(self, variant: Spec) -> bool:
        """Whether the budget pays for a variant; if so, it is spent."""
        if self._left is None:
            return True
        planned = plan_job(variant)
        run = planned["run"].rsplit("/", 1)[-1]
        if run not in self._prices:
            self._prices[run] = sum(step["flops"] or 0 for step in planned["steps"].values())
            self._decisions.add({"run": run, "flops": self._prices[run]})
        if self._prices[run] > self._left:
            return False
        self._left -= self._prices[run]
        return True
