"""The Attempts actor counts how often each part was begun, so that a poison part ends.

Ray retries a lost actor's work for ever. A worker asks here before it starts a part; a part that
was begun and not finished too often is given up. An attempt that was lost together with its node
counts against a larger budget: preemption is not the part's fault.
"""

from collections import Counter

import ray

from stillhouse.actors.metrics import StepMetrics

PREEMPTION_BUDGET = 100


@ray.remote(num_cpus=0, max_restarts=-1)
class Attempts:
    """Attempts by part, of one run."""

    def __init__(self, budget: int, run: str = "") -> None:
        self._budget = budget
        self._metrics = StepMetrics(run)
        self._program: Counter[str] = Counter()
        self._hardware: Counter[str] = Counter()
        self._begun: Counter[str] = Counter()
        self._open: dict[str, str] = {}

    def begin(self, part: str, node: str) -> tuple[int, str | None]:
        """Note an attempt at `part` on `node`.

        Returns:
            How many attempts there were before, and why the part is given up (None to go ahead).
        """
        before = self._open.get(part)
        if before is not None:
            reason = "program" if before in _alive_nodes() else "hardware"
            {"program": self._program, "hardware": self._hardware}[reason][part] += 1
            self._metrics.retry(reason)
        if self._program[part] >= self._budget:
            return self._before(part), f"killed its worker {self._program[part]} times"
        if self._hardware[part] >= PREEMPTION_BUDGET:
            return self._before(part), f"lost its node {self._hardware[part]} times"
        self._open[part] = node
        self._begun[part] += 1
        self._metrics.in_flight(len(self._open))
        return self._before(part), None

    def _before(self, part: str) -> int:
        return self._begun[part] - 1

    def finish(self, part: str) -> None:
        """Note that `part` was finished (or failed with an error of its own)."""
        self._open.pop(part, None)
        self._metrics.in_flight(len(self._open))

    def unreached(self) -> None:
        """Note that a part is done again for it could not reach the store."""
        self._metrics.retry("hardware")

    def retries(self) -> dict[str, int]:
        """Repeated attempts so far, by class."""
        return {
            "program": sum(self._program.values()),
            "hardware": sum(self._hardware.values()),
        }


def _alive_nodes() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}
