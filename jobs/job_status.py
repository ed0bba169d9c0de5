"""`stillhouse status JOB_ID`: a submitted job, from Ray while it is there, and from its store."""

import os
from typing import Any

from stillhouse.errors import ArtifactError, ClusterError
from stillhouse.jobs.ray_jobs import ADDRESS_VARIABLE, Cluster
from stillhouse.jobs.status import status_of
from stillhouse.storage.filesystem import absolute_uri, join, list_names
from stillhouse.storage.run_record import read_json


def job_status(job_id: str, address: str | None, store: str | None) -> dict[str, Any]:
    """What Ray and the store know of a submitted job.

    Args:
        job_id: as `submit` printed it.
        address: of the dashboard, or None for that of the environment.
        store: where to look when Ray does not say; it knows the store of a job that it knows.

    Returns:
        `job_id`; `cluster` (state, message, first error line of the output; None without Ray, then
        `why_not` says why);
        `run`, the run's status as its store has it, or None while there is none.

    Raises:
        ClusterError: no Ray to ask, and no store given. ArtifactError: nobody knows the job.
    """
    said, why_not = _ask_ray(job_id, address, store)
    place = said["store"] if said is not None else store
    run = None if place is None else run_of(place, job_id)
    if said is None and run is None:
        raise ArtifactError(
            f"no run in {store} was made by job {job_id}: is this its store (`--store`)? A job "
            "that found nothing to do leaves no trace there"
        )
    return {"job_id": job_id, "cluster": said, "why_not": why_not, "run": run}


def _ask_ray(
    job_id: str, address: str | None, store: str | None
) -> tuple[dict[str, Any] | None, str | None]:
    """What Ray says; where it cannot be asked and there is a store to look at, None and why."""
    known = address or os.environ.get(ADDRESS_VARIABLE) or os.environ.get("RAY_ADDRESS")
    if store is not None and not known:
        return None, "no cluster was asked"
    try:
        cluster = Cluster(address)
        job = cluster.job(job_id)
    except ClusterError as error:
        if store is None:
            raise
        return None, str(error)
    if job is None:
        if store is None:
            raise ArtifactError(
                f"the cluster at {cluster.url} does not know job {job_id} (its head was replaced?)"
                ": give `--store` to see what is in its store"
            )
        return None, f"the cluster at {cluster.url} does not know it"
    state = job.status.value
    failed = job.status.is_terminal() and state != "SUCCEEDED"
    told = {
        "address": cluster.url,
        "state": state,
        "exit_code": job.driver_exit_code,
        "store": (job.metadata or {}).get("stillhouse_store"),
        "error": first_error(cluster.output(job_id)) or (job.message or "") if failed else None,
    }
    return told, None


def first_error(output: str) -> str | None:
    """The line that says why: our own `error:`, else the end of the first traceback."""
    lines = output.splitlines()
    for line in lines:
        if line.startswith("error: "):
            return line.removeprefix("error: ")
    starts = [number for number, line in enumerate(lines) if line.startswith("Traceback")]
    if not starts:
        return None
    behind = [line for line in lines[starts[0] + 1 :] if line and not line.startswith(" ")]
    return behind[0] if behind else None


def run_of(store: str, job_id: str) -> dict[str, Any] | None:
    """The status of the run that a submitted job worked on last, from the store alone."""
    folder = join(absolute_uri(store), "runs")
    for name in list_names(folder):
        found = read_json(join(folder, name), "status.json")
        if found is not None and found.get("submission") == job_id:
            return status_of(join(folder, name))
    return None
