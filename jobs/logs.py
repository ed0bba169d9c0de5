"""`stillhouse logs`: what happened in a run, or what a submitted job printed."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from stillhouse.errors import ArtifactError
from stillhouse.jobs.status import find
from stillhouse.storage.filesystem import absolute_uri, join, read_bytes
from stillhouse.storage.run_record import event_files, read_status

_POLL_S = 2.0


def show_logs(
    text: str,
    address: str | None,
    store: str | None,
    *,
    follow: bool,
    write: Callable[[str], object],
) -> dict[str, Any]:
    """Write the events of a run, one a line, or the output of a submitted job.

    Args:
        text: a run's URI or id, or that of a submitted job.
        address, store: as `status` has them.
        follow: go on until the run or the job ends, or Ctrl-C.

    Returns:
        `run` and `events`, or `job_id` and `output`.

    Raises:
        ArtifactError: no such run or job. SpecError, ClusterError: as `find`.
    """
    job_id, place = find(text, address, store)
    if job_id is not None:
        return _output(job_id, address, follow, write)
    run, events = absolute_uri(place), list[dict[str, Any]]()
    if read_status(run) is None:
        raise ArtifactError(f"{place} is no run: give a run of `stillhouse status STORE`")
    with suppress(KeyboardInterrupt):
        for event in _events(run, follow):
            events.append(event)
            write(event_line(event) + "\n")
    return {"run": run, "events": events}


def _output(
    job_id: str, address: str | None, follow: bool, write: Callable[[str], object]
) -> dict[str, Any]:
    from stillhouse.jobs.ray_jobs import Cluster

    cluster = Cluster(address)
    if cluster.job(job_id) is None:
        raise ArtifactError(f"the cluster at {cluster.url} does not know job {job_id}")
    if not follow:
        output = cluster.output(job_id)
        write(output)
        return {"job_id": job_id, "output": output}
    pieces = list[str]()
    with suppress(KeyboardInterrupt):
        cluster.follow(job_id, lambda piece: (pieces.append(piece), write(piece)))
    return {"job_id": job_id, "output": "".join(pieces)}


def _events(run: str, follow: bool) -> Iterator[dict[str, Any]]:
    """The events in the order in which they were written."""
    shown = 0
    while True:
        running = follow and (read_status(run) or {}).get("state") == "running"
        names = sorted(event_files(run))
        for name in names[shown:]:
            yield from map(json.loads, read_bytes(join(run, name)).splitlines())
        shown = len(names)
        if not running:
            return
        time.sleep(_POLL_S)


def event_line(event: dict[str, Any]) -> str:
    """An event for people: time, kind, and its message or its values."""
    rest = {k: v for k, v in event.items() if k not in ("time", "attempt", "event")}
    said = rest.pop("message", None)
    values = [f"{key}={_short(value)}" for key, value in rest.items() if value is not None]
    return " ".join([event["time"], event["event"], *([said] if said else values)])


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)
