"""`stillhouse stop`: end a run or a submitted job, so that the same command goes on with it."""

import time
from typing import Any

from stillhouse.errors import ArtifactError
from stillhouse.jobs.status import find, job_status
from stillhouse.storage.filesystem import absolute_uri
from stillhouse.storage.run_record import ask_to_stop, read_status

_POLL_S = 1.0


def stop_run(text: str, address: str | None, store: str | None, wait_s: float) -> dict[str, Any]:
    """Ask the driver of a run to end, by way of its store, and wait until it has.

    A submitted job that has no run yet is ended by Ray.

    Args:
        text: a run's URI or id, or that of a submitted job.
        address, store: as `status` has them.
        wait_s: for the driver.

    Returns:
        `run` (None without one), `job_id` (None of a run that was not submitted), `was` and
        `state`, before and after.

    Raises:
        ArtifactError: no such run or job. SpecError, ClusterError: as `find`.
    """
    job_id, place = find(text, address, store)
    if job_id is None:
        return _stop(absolute_uri(place), None, wait_s)
    found = job_status(job_id, address, store)
    run = found["run"]
    if run is not None and run.get("submission") == job_id:
        return _stop(run["uri"], job_id, wait_s)
    state = "lost" if found["cluster"] is None else found["cluster"]["state"]
    stopped = {"run": None if run is None else run["uri"], "job_id": job_id, "was": state}
    if state not in ("PENDING", "RUNNING"):
        return stopped | {"state": state}
    from stillhouse.jobs.ray_jobs import Cluster

    cluster, until = Cluster(address), time.monotonic() + wait_s
    cluster.stop(job_id)
    while state in ("PENDING", "RUNNING") and time.monotonic() < until:
        time.sleep(_POLL_S)
        job = cluster.job(job_id)
        state = "lost" if job is None else job.status.value
    return stopped | {"state": state}


def _stop(run: str, job_id: str | None, wait_s: float) -> dict[str, Any]:
    status = read_status(run)
    if status is None:
        raise ArtifactError(f"{run} is no run: give a run of `stillhouse status STORE`")
    was, attempt = status["state"], status.get("attempt", 1)
    if was == "running":
        ask_to_stop(run, attempt)
    until = time.monotonic() + wait_s
    while status["state"] == "running" and time.monotonic() < until:
        time.sleep(_POLL_S)
        status = read_status(run) or status
        if status.get("attempt", 1) != attempt:  # ended, and started again by someone
            break
    return {"run": run, "job_id": job_id, "was": was, "state": status["state"]}
