"""The record of a run, which can be read from the store alone when its cluster is gone.

`runs/<fingerprint>/`: `spec.yaml` (resolved), `events-00000001.jsonl`, ... (created, never
changed), `status.json` (replaced), `report.json` and `report.html`, and at the end `result.json`
and `digests.json`: the sha256 of every other file but the status.

`status.json` is a lease: a running job renews it, and a run that did not for `LEASE_S` is lost.
`stop.json` asks the driver of an attempt to end; the driver looks for it when it renews its lease,
so that a run can be stopped from any machine that reaches the store.
"""

import json
import logging
import os
import platform
import signal
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
from stillhouse.storage.reachability import is_pruned, list_objects, wait_for_prune
from stillhouse.storage.sealed import seal, unseal

DIGESTS, _STATUS, _STOP = "digests.json", "status.json", "stop.json"
LEASE_S = 60.0
"""A run whose status says `running` and is older is `lost`."""
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
        self._asked_to_stop = False

    def start(
        self, spec_yaml: str, job: str, submission: str | None = None, name: str | None = None
    ) -> None:
        """Record the resolved spec and the start of an attempt; wait for a prune that is at work.

        From here to `finish` a thread renews the lease. `submission` is Ray's id of the job.
        """
        create_or_adopt(join(self.uri, "spec.yaml"), spec_yaml.encode())
        earlier = _earlier_attempts(self.uri)
        self._status |= {"job": job, "name": name, "state": "running", "started": now()}
        self._status |= {"submission": submission} if submission else {}
        self._status["attempt"] = 1 + (earlier[-1]["attempt"] if earlier else 0)
        self._status["earlier"] = earlier
        self.event("started", {"host": platform.node()}, flush=True)
        threading.Thread(target=self._renew, daemon=True).start()
        if is_pruned(self._store):
            _log.warning("a prune is at work in %s: waiting for its end", self._store)
            self.event("waiting", {"for": "prune"}, flush=True)
            wait_for_prune(self._store)

    def _renew(self) -> None:
        while not self._ended.wait(_BEAT_S):
            with suppress(StorageError), self._lock:  # the next renewal, or the job, raises it
                if not self._ended.is_set() and time.monotonic() - self._flushed > _FLUSH_S:
                    self.flush()
            with suppress(StorageError):
                self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        """Interrupt this process, as Ctrl-C does, if `ask_to_stop` means this attempt."""
        if self._asked_to_stop or self._ended.is_set():
            return
        asked = read_json(self.uri, _STOP)
        if asked is not None and asked["attempt"] == self._status["attempt"]:
            self._asked_to_stop = True
            self.event("asked to stop", {"host": asked["host"]}, flush=True)
            os.kill(os.getpid(), signal.SIGINT)

    def event(self, kind: str, content: dict[str, Any], *, flush: bool = False) -> None:
        """Add an event; it is written within seconds, at once with `flush`."""
        with self._lock:
            self._buffer.append({"time": now(), "attempt": self._attempt, "event": kind, **content})
            if flush or time.monotonic() - self._flushed > _FLUSH_S:
                self.flush()

    def step(self, name: str, **content: Any) -> None:
        """Update the entry of a step in the status page."""
        with self._lock:
            self._status["steps"].setdefault(name, {}).update(content)

    def flush(self) -> None:
        """Write the buffered events as the next numbered object, and the status page."""
        with self._lock:
            if self._buffer:
                lines = "".join(json.dumps(event) + "\n" for event in self._buffer).encode()
                self._number += 1
                while create_or_adopt(self._events(self._number), lines) != lines:
                    self._number += 1
                self._buffer = []
            self._status["updated"] = now()
            _put_status(self.uri, self._status)
            self._flushed = time.monotonic()

    def _events(self, number: int) -> str:
        return join(self.uri, f"events-{number:08d}.jsonl")

    def finish(
        self, state: str, error: str | None = None, failed_at: dict[str, Any] | None = None
    ) -> None:
        """Record how the attempt ended: `done`, or `failed` or `stopped` with `error` and where.

        If it is done, the digests of its files are written.
        """
        self._ended.set()
        if state == "stopped" and self._asked_to_stop:
            error = "stopped by `stillhouse stop`"
        with self._lock:
            self._status |= {"state": state, "error": error, "failed_at": failed_at, "ended": now()}
            self.event(state, {"error": error} | (failed_at or {}) if error else {}, flush=True)
            if state == "done":
                put_digests(self.uri)

    def put_result(self, result: dict[str, Any]) -> None:
        """Write the result, which a later run of the same spec returns at once."""
        plain = json.loads(json.dumps(result), parse_constant=lambda _: None)  # NaN is no JSON
        replace(join(self.uri, "result.json"), seal(plain, indent=1))


def _put_status(run_uri: str, status: dict[str, Any]) -> None:
    replace(join(run_uri, _STATUS), json.dumps(status, indent=1).encode())


def read_status(run_uri: str, clock: float | None = None) -> dict[str, Any] | None:
    """The status page of a run; None where there is no run.

    `state` is `running`, `done`, `failed`, `stopped` (by a signal, or with Ray) or `lost` (not
    renewed for `LEASE_S` until `clock`, seconds since 1970; default now).
    """
    status = read_json(run_uri, _STATUS)
    if status is not None and status.get("state") == "running":
        now_s = time.time() if clock is None else clock
        if now_s - datetime.fromisoformat(status["updated"]).timestamp() > LEASE_S:
            status["state"] = "lost"
    return status


def ask_to_stop(run_uri: str, attempt: int) -> None:
    """Ask the driver of an attempt to end; it does within seconds, or not at all if it is lost."""
    asked = {"attempt": attempt, "host": platform.node(), "time": now()}
    replace(join(run_uri, _STOP), seal(asked))


def mark_stopped(run_uri: str, error: str) -> None:
    """Record that the driver of a run ended without recording it."""
    status = read_json(run_uri, _STATUS)
    if status is not None and status.get("state") == "running":
        _put_status(run_uri, status | {"state": "stopped", "error": error, "ended": now()})


def _earlier_attempts(run_uri: str) -> list[dict[str, Any]]:
    """The earlier attempts of a run and how they ended, in order."""
    status = read_json(run_uri, _STATUS)
    if status is None:
        return []
    kept = ("attempt", "state", "started", "updated", "error", "failed_at", "submission")
    last = {key: status.get(key) for key in kept} | {"attempt": status.get("attempt", 1)}
    if last["state"] == "running":
        last["state"] = "lost"
    return [*status.get("earlier", []), last][-_MAX_ATTEMPTS:]


def event_files(run_uri: str) -> list[str]:
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
    """Add the sha256 of the files of a run that have none yet, and of those that `changed`."""
    known = {n: d for n, d in (read_json(run_uri, DIGESTS) or {}).items() if n not in changed}
    new = [n for n in recorded(run_uri) if n not in known]
    contents = read_many([join(run_uri, name) for name in new])
    digests = known | {name: sha256(data) for name, data in zip(new, contents, strict=True)}
    replace(join(run_uri, DIGESTS), seal(digests, indent=1))


def recorded(run_uri: str) -> list[str]:
    """The files of a run that are final once it is done, relative to its folder."""
    paths = [item.path for item in list_objects(run_uri) if not item.is_temporary]
    return [path for path in paths if path not in {DIGESTS, _STATUS, _STOP}]
