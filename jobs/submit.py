"""`stillhouse submit`: a spec, checked here, run on a Ray cluster that is already there."""

import shlex
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stillhouse.fingerprint import fingerprint
from stillhouse.jobs.kinds import Listed, Spec, list_job
from stillhouse.jobs.package import own_code, requirements, write_package
from stillhouse.jobs.paths import refuse_local_paths, with_absolute_paths
from stillhouse.jobs.publish import check_name
from stillhouse.jobs.ray_jobs import Cluster
from stillhouse.storage.artifact import Store
from stillhouse.storage.commit import check_store
from stillhouse.storage.filesystem import remember_options, use_options

_ENTRYPOINT = "-m stillhouse.jobs.entry"
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Submission:
    """A job on a cluster; `attached` where it was pending or running before."""

    job_id: str
    attempt: int
    attached: bool
    address: str
    store: str
    sent_bytes: int


def submit_job(spec: Spec, cluster: Cluster) -> Submission:
    """Check the spec and what it reads, then submit it, or attach to an attempt at work.

    Args:
        spec: the job; local paths only for a cluster on this machine.
        cluster: where.

    Raises:
        StillhouseError: a local path, data or store that cannot be reached, a cluster that does
            not answer.
    """
    python = "python"  # what an image has on its PATH
    if cluster.is_this_machine():
        spec, python = with_absolute_paths(spec), shlex.quote(sys.executable)
    else:
        refuse_local_paths(spec, f"the cluster at {cluster.url}")
    name = submission_name(spec, check_reach(spec))
    while True:
        attempts = cluster.attempts(name)
        latest = max(attempts, default=0)
        if attempts and not attempts[latest].status.is_terminal():
            return Submission(f"{name}-{latest}", latest, True, cluster.url, spec.store, 0)
        job_id = f"{name}-{latest + 1}"
        with tempfile.TemporaryDirectory() as folder:
            package = Path(folder) / "job.zip"
            size = write_package(package, spec)
            told = {"stillhouse_store": spec.store, "stillhouse_name": spec.name or ""}
            command = f"{python} {_ENTRYPOINT} {job_id}"
            if cluster.start(job_id, command, package, told, requirements(spec)):
                return Submission(job_id, latest + 1, False, cluster.url, spec.store, size)


def check_reach(spec: Spec) -> Listed:
    """Look at all that the spec names from here: data, models, store, published name.

    Raises:
        StillhouseError: what cannot be read, or a name that another spec publishes.
    """
    use_options(spec.store, spec.storage_options)
    remember_options(spec.store, spec.storage_options)
    listed = list_job(spec)
    check_name(Store(check_store(spec.store)), spec)
    return listed


def submission_name(spec: Spec, listed: Listed) -> str:
    """What tells one job from another before its data are read: the spec and the listed files.

    Widths do not count, so that submitting again with other ones attaches to the job at work.
    """
    asked = spec.model_dump(mode="json", exclude={"compute", "name"})
    files = [[[file.uri, file.size_bytes, file.stamp] for file in part] for part in listed.files]
    identity = [code.digest for code in own_code(spec)] or None
    return fingerprint(["submission", _VERSION, asked, files, identity])


def follow_job(
    cluster: Cluster, submission: Submission, write: Callable[[str], object]
) -> dict[str, Any]:
    """Show the job's output to its end.

    Returns:
        `state`, `exit_code` and `message`.

    Raises:
        LostClusterError: the cluster went away.
    """
    job = cluster.follow(submission.job_id, write)
    state = job.status.value
    code = job.driver_exit_code
    if code is None or (code != 0) != (state == "FAILED"):
        code = {"SUCCEEDED": 0, "STOPPED": 4}.get(state, 1)
    if job.driver_exit_code is None:
        said = (job.message or "").strip().partition("\n")[0]
    else:  # what the message goes on with was shown
        said = f"exit code {job.driver_exit_code}"
    return {"state": state, "exit_code": code, "message": said}


def run_submit(
    spec: Spec, address: str | None, *, follow: bool, command: str, quiet: bool
) -> tuple[dict[str, Any], int]:
    """The verb: submit, say so, and follow where asked.

    Args:
        spec: the job.
        address: the dashboard's, or None for that of the environment.
        follow: show the output to the end.
        command: what the user types to come back.
        quiet: keep stdout free.

    Returns:
        The object that `submit --json` prints, and the exit code.
    """
    cluster = Cluster(address)
    submission = submit_job(spec, cluster)
    found = asdict(submission)
    verb = "attached to" if submission.attached else "submitted"
    _say(f"{verb} job {submission.job_id} (attempt {submission.attempt}) at {cluster.url}")
    if not follow:
        _say(f"next:   {command}")
        return found, 0
    try:
        ended = follow_job(cluster, submission, _to(quiet))
    except KeyboardInterrupt:
        _say(f"\nthe job goes on; come back with: {command}")
        return found | {"state": "RUNNING"}, 4
    if ended["exit_code"]:
        _say(f"job {ended['state'].lower()}: {ended['message']}")
    return found | ended, ended["exit_code"]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _to(quiet: bool) -> Callable[[str], object]:
    stream = sys.stderr if quiet else sys.stdout

    def write(text: str) -> None:
        stream.write(text)
        stream.flush()

    return write
