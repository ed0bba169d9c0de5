"""`stillhouse status JOB_ID`: a submitted job, from Ray while it is there, and from its store."""

import os
from typing import TYPE_CHECKING, Any

from stillhouse.errors import ArtifactError, ClusterError, SpecError
from stillhouse.jobs.ids import ADDRESS_VARIABLE, DEFAULT_STORE, JOB_ID, is_job, jobs_in, one_of
from stillhouse.jobs.status import status_of
from stillhouse.storage.filesystem import absolute_uri, join, list_names
from stillhouse.storage.run_record import read_status

if TYPE_CHECKING:
    from stillhouse.jobs.ray_jobs import Cluster


def find(text: str, address: str | None, store: str | None) -> tuple[str | None, str]:
    """What was asked for: the id of a submitted job, or None and the URI of something else.

    Raises:
        SpecError: a prefix of no id that is known, or of several.
    """
    if JOB_ID.fullmatch(text):
        return text, ""
    if not is_job(text):
        return None, text
    place = absolute_uri(store or DEFAULT_STORE)
    runs = {name: join(place, "runs", name) for name in list_names(join(place, "runs"))}
    found = _beginning([*runs, *jobs_in(place)], text)
    if not found and _asked(address):
        found = _beginning(_cluster(address).job_ids(), text)
    name = one_of(text, found, f"the runs and jobs of {place}")
    return (None, runs[name]) if name in runs else (name, "")


def _beginning(ids: list[str], text: str) -> list[str]:
    """Those that begin with a prefix; `0123abcd-2` is attempt 2 of the jobs that do."""
    stem, mark, number = text.partition("-")
    return sorted(one for one in ids if one.startswith(stem) and one.endswith(mark + number))


def run_to_follow(known: dict[str, Any]) -> str:
    """The URI of a submitted job's run.

    Raises:
        SpecError: it has none yet.
    """
    if known["run"] is None:
        job = known["job_id"]
        raise SpecError(f"job {job} has no run yet: follow it with `submit SPEC --follow`")
    return known["run"]["uri"]


def _cluster(address: str | None) -> "Cluster":
    from stillhouse.jobs.ray_jobs import Cluster  # brings Ray, which a store alone does not need

    return Cluster(address)


def _asked(address: str | None) -> bool:
    """Whether there is a cluster to ask."""
    named = (address, os.environ.get(ADDRESS_VARIABLE), os.environ.get("RAY_ADDRESS"))
    return any(named)


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
    if store is not None and not _asked(address):
        return None, "no cluster was asked"
    try:
        cluster = _cluster(address)
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
    """The status of the run that a submitted job worked on, from the store alone.

    Where another attempt at that run came later, `was` holds how this job's own one ended.
    """
    folder = join(absolute_uri(store), "runs")
    for name in list_names(folder):
        found = read_status(join(folder, name)) or {}
        if found.get("submission") == job_id:
            return status_of(join(folder, name))
        was = [one for one in found.get("earlier", []) if one["submission"] == job_id]
        if was:
            return status_of(join(folder, name)) | {"was": was[-1]}
    return None
