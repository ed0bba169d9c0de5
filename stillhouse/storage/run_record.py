"""The record of a run: readable from the store alone, also when its cluster is gone.

`runs/<fingerprint>/`: `spec.yaml` (resolved), `events-00000001.jsonl`, ... (created, never
changed), `status.json` (replaced), `report.json` and `report.html`, and at the end `result.json`.
"""

import json
import logging
import platform
import time
import uuid
from datetime import UTC, datetime
from typing import Any

from stillhouse.errors import ArtifactError
from stillhouse.storage.artifact import Store
from stillhouse.storage.commit import create_or_adopt, replace
from stillhouse.storage.filesystem import join, list_names, read_bytes
from stillhouse.storage.pruning import promised, wait_for_prune

_FLUSH_S = 5.0
_log = logging.getLogger(__name__)


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class RunRecord:
    """Writes the record of one attempt at a run."""

    def __init__(self, store: Store, fingerprint: str) -> None:
        self.uri = store.path("runs", fingerprint)
        self._store = store.uri
        self._buffer: list[dict[str, Any]] = []
        self._flushed = time.monotonic()
        self._attempt = uuid.uuid4().hex[:8]
        self._number = len(event_files(self.uri))
        self._status: dict[str, Any] = {"run": fingerprint, "steps": {}}

    def start(self, spec_yaml: str, job: str, submission: str | None = None) -> None:
        """Note the resolved spec and that an attempt starts, by which submitted job if by one.

        Waits for a prune that is at work.
        """
        create_or_adopt(join(self.uri, "spec.yaml"), spec_yaml.encode())
        self._status |= {"job": job, "state": "running", "started": now()}
        self._status |= {"submission": submission} if submission else {}
        self.event("started", {"host": platform.node()}, flush=True)
        if promised(self._store):
            _log.warning("a prune is at work in %s: waiting for its end", self._store)
            self.event("waiting", {"for": "prune"}, flush=True)
            wait_for_prune(self._store)

    def event(self, kind: str, content: dict[str, Any], *, flush: bool = False) -> None:
        """Add an event; it reaches the store within seconds, at once with `flush`."""
        self._buffer.append({"time": now(), "attempt": self._attempt, "event": kind, **content})
        if flush or time.monotonic() - self._flushed > _FLUSH_S:
            self.flush()

    def step(self, name: str, **content: Any) -> None:
        """Update what `status` shows of a step."""
        self._status["steps"].setdefault(name, {}).update(content)

    def flush(self) -> None:
        """Write the buffered events as the next numbered object, and the status page."""
        if self._buffer:
            lines = "".join(json.dumps(event) + "\n" for event in self._buffer).encode()
            self._number += 1
            while create_or_adopt(join(self.uri, _event_name(self._number)), lines) != lines:
                self._number += 1
            self._buffer = []
        self._status["updated"] = now()
        replace(join(self.uri, "status.json"), json.dumps(self._status, indent=1).encode())
        self._flushed = time.monotonic()

    def finish(
        self, state: str, error: str | None = None, failed_at: dict[str, Any] | None = None
    ) -> None:
        """Note how the attempt ended: done, or failed with `error` at a step, part and node."""
        self._status |= {"state": state, "error": error, "failed_at": failed_at, "ended": now()}
        self.event(state, {"error": error} | (failed_at or {}) if error else {}, flush=True)

    def put_result(self, result: dict[str, Any]) -> None:
        """The result that a later run with the same spec gives at once."""
        replace(join(self.uri, "result.json"), json.dumps(result, indent=1).encode())


def _event_name(number: int) -> str:
    return f"events-{number:08d}.jsonl"


def event_files(run_uri: str) -> list[str]:
    """Names of a run's event objects in order."""
    names = list_names(run_uri)
    return [name for name in names if name.startswith("events-") and name.endswith(".jsonl")]


def read_json(run_uri: str, name: str) -> dict[str, Any] | None:
    """`status.json` or `result.json` of a run; None where it is not there."""
    uri = join(run_uri, name)
    try:
        return json.loads(read_bytes(uri))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ArtifactError(f"{uri} is broken: {error}; remove it") from error
