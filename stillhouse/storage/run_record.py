"""The record of a run: readable from the store alone, also when its cluster is gone.

`runs/<fingerprint>/`: `spec.yaml` (resolved), `events-00000001.jsonl`, ... (created, never
changed), `status.json` (replaced), `report.json` and `report.html`, and at the end `result.json`
and `digests.json`: the sha256 of every other file but the status.

`status.json` is a lease: a run at work renews it, and one that did not for `LEASE_S` is lost.
"""

import json
import logging
import platform
import threading
import time
import uuid
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from stillhouse.errors import StorageError
from stillhouse.fingerprint import sha256
from stillhouse.storage.artifact import Store
from stillhouse.storage.commit import create_or_adopt, replace
from stillhouse.storage.filesystem import join, list_names, read_bytes, read_many
from stillhouse.storage.pruning import promised, wait_for_prune
from stillhouse.storage.reachability import list_objects
from stillhouse.storage.sealed import seal, unseal

DIGESTS = "digests.json"
LEASE_S = 60.0
"""A run that says `running` and was not heard of for longer is `lost`."""
_BEAT_S = 15.0
_FLUSH_S = 5.0
_MAX_ATTEMPTS = 20
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
        self._lock = threading.RLock()
        self._ended = threading.Event()

    def start(
        self, spec_yaml: str, job: str, submission: str | None = None, name: str | None = None
    ) -> None:
        """Note the resolved spec and that an attempt starts, by which submitted job if by one.

        Waits for a prune that is at work. From here to `finish` a thread renews the lease.
        """
        create_or_adopt(join(self.uri, "spec.yaml"), spec_yaml.encode())
        earlier = _earlier_attempts(self.uri)
        self._status |= {"job": job, "name": name, "state": "running", "started": now()}
        self._status |= {"submission": submission} if submission else {}
        self._status["attempt"] = 1 + (earlier[-1]["attempt"] if earlier else 0)
        self._status["earlier"] = earlier
        self.event("started", {"host": platform.node()}, flush=True)
        threading.Thread(target=self._renew, daemon=True).start()
        if promised(self._store):
            _log.warning("a prune is at work in %s: waiting for its end", self._store)
            self.event("waiting", {"for": "prune"}, flush=True)
            wait_for_prune(self._store)

    def _renew(self) -> None:
        while not self._ended.wait(_BEAT_S):
            with suppress(StorageError), self._lock:  # the next time, or the job itself, finds out
                if not self._ended.is_set() and time.monotonic() - self._flushed > _FLUSH_S:
                    self.flush()

    def event(self, kind: str, content: dict[str, Any], *, flush: bool = False) -> None:
        """Add an event; it reaches the store within seconds, at once with `flush`."""
        with self._lock:
            self._buffer.append({"time": now(), "attempt": self._attempt, "event": kind, **content})
            if flush or time.monotonic() - self._flushed > _FLUSH_S:
                self.flush()

    def step(self, name: str, **content: Any) -> None:
        """Update what `status` shows of a step."""
        with self._lock:
            self._status["steps"].setdefault(name, {}).update(content)

    def flush(self) -> None:
        """Write the buffered events as the next numbered object, and the status page."""
        with self._lock:
            if self._buffer:
                lines = "".join(json.dumps(event) + "\n" for event in self._buffer).encode()
                self._number += 1
                while create_or_adopt(join(self.uri, _event_name(self._number)), lines) != lines:
                    self._number += 1
                self._buffer = []
            self._status["updated"] = now()
            _put_status(self.uri, self._status)
            self._flushed = time.monotonic()

    def finish(
        self, state: str, error: str | None = None, failed_at: dict[str, Any] | None = None
    ) -> None:
        """Note how the attempt ended: `done`, or `failed` or `stopped` with `error` and where.

        Of one that is done, the sha256 of what it recorded is kept.
        """
        self._ended.set()
        with self._lock:
            self._status |= {"state": state, "error": error, "failed_at": failed_at, "ended": now()}
            self.event(state, {"error": error} | (failed_at or {}) if error else {}, flush=True)
            if state == "done":
                put_digests(self.uri)

    def put_result(self, result: dict[str, Any]) -> None:
        """The result that a later run with the same spec gives at once."""
        plain = json.loads(json.dumps(result), parse_constant=lambda _: None)  # NaN is no JSON
        replace(join(self.uri, "result.json"), seal(plain, indent=1))


def _put_status(run_uri: str, status: dict[str, Any]) -> None:
    replace(join(run_uri, "status.json"), json.dumps(status, indent=1).encode())


def read_status(run_uri: str, clock: float | None = None) -> dict[str, Any] | None:
    """The status of a run as its store has it; None where there is no run.

    `state` is `running`, `done`, `failed`, `stopped` (by a signal, or with Ray) or `lost` (not
    heard of for `LEASE_S` until `clock`, seconds since 1970; default now).
    """
    found = read_json(run_uri, "status.json")
    if found is not None and found.get("state") == "running":
        age = (time.time() if clock is None else clock) - _seconds(found["updated"])
        found["state"] = "lost" if age > LEASE_S else "running"
    return found


def mark_stopped(run_uri: str, error: str) -> None:
    """Note that the driver of a run ended without a word."""
    found = read_json(run_uri, "status.json")
    if found is not None and found.get("state") == "running":
        _put_status(run_uri, found | {"state": "stopped", "error": error, "ended": now()})


def _earlier_attempts(run_uri: str) -> list[dict[str, Any]]:
    """How the attempts before this one ended, the last one last."""
    found = read_json(run_uri, "status.json")
    if found is None:
        return []
    kept = ("attempt", "state", "started", "updated", "error", "failed_at", "submission")
    last = {key: found.get(key) for key in kept} | {"attempt": found.get("attempt", 1)}
    if last["state"] == "running":
        last["state"] = "lost"
    return [*found.get("earlier", []), last][-_MAX_ATTEMPTS:]


def _seconds(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()


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
        return unseal(read_bytes(uri), uri)
    except FileNotFoundError:
        return None


def put_digests(run_uri: str, *changed: str) -> None:
    """Keep the sha256 of the files of a run that have none yet, and of those that `changed`."""
    known = {n: d for n, d in (read_json(run_uri, DIGESTS) or {}).items() if n not in changed}
    new = [n for n in recorded(run_uri) if n not in known]
    read = read_many([join(run_uri, name) for name in new])
    digests = known | {name: sha256(data) for name, data in zip(new, read, strict=True)}
    replace(join(run_uri, DIGESTS), seal(digests, indent=1))


def recorded(run_uri: str) -> list[str]:
    """The files of a run that are final once it is done, relative to its folder."""
    there = [item.path for item in list_objects(run_uri) if not item.is_temporary]
    return [path for path in there if path not in {DIGESTS, "status.json"}]
