"""A running cluster and its jobs, through Ray's Jobs API; every failure is one sentence."""

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

from stillhouse.errors import ClusterError, LostClusterError
from stillhouse.jobs.cluster import check_version, token, token_refused
from stillhouse.jobs.ids import ADDRESS_VARIABLE

_TIMEOUT_S = 10
_PAUSE_S = 2.0
_MAX_FAILURES = 15
_NOISY_LOGGERS = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)


def dashboard_url(given: str | None) -> str:
    """The dashboard's URL: given, or from RAY_API_SERVER_ADDRESS or RAY_ADDRESS.

    Raises:
        ClusterError: none of them, or not http.
    """
    address = given or os.environ.get(ADDRESS_VARIABLE) or os.environ.get("RAY_ADDRESS") or ""
    url = address if "://" in address else f"http://{address}"
    if not address or address == "auto" or urlsplit(url).scheme not in {"http", "https"}:
        raise ClusterError(
            f"{address or 'no address'!r} is no dashboard: give --address http://HOST:8265 "
            "(or set RAY_API_SERVER_ADDRESS)"
        )
    return url.rstrip("/")


class Cluster:
    """A running cluster, reached over its dashboard.

    Raises:
        ClusterError: nothing answers, no Ray, another Ray version, no token or a wrong one.
    """

    def __init__(self, address: str | None) -> None:
        for name in _NOISY_LOGGERS:
            logging.getLogger(name).setLevel(logging.WARNING)
        self.url = dashboard_url(address)
        found = token()
        self._source = found[1] if found else None
        self._headers = {"Authorization": f"Bearer {found[0]}"} if found else {}
        check_version(self.url, str(self._get("/api/version").get("ray_version")))
        with self._explained(), _only_address(self.url):
            self._client = JobSubmissionClient(self.url, headers=dict(self._headers))

    def _get(self, path: str) -> Any:
        try:
            answer = requests.get(self.url + path, headers=self._headers, timeout=_TIMEOUT_S)
        except requests.RequestException as error:
            raise ClusterError(
                f"no Ray cluster answers at {self.url} ({type(error).__name__}): is it up, and is "
                "this its dashboard (usually port 8265, by way of a tunnel)?"
            ) from None
        if answer.status_code in {401, 403}:
            raise self._refused()
        try:
            answer.raise_for_status()
            return answer.json()
        except requests.RequestException:
            raise ClusterError(
                f"{self.url} is no Ray dashboard: {path} gives {answer.status_code}"
            ) from None

    def _refused(self) -> ClusterError:
        return token_refused(self.url, self._source)

    @contextmanager
    def _explained(self) -> Generator[None]:
        try:
            yield
        except AuthenticationError:
            raise self._refused() from None
        except (ConnectionError, requests.RequestException) as error:
            raise LostClusterError(
                f"the cluster at {self.url} does not answer any more ({type(error).__name__}): "
                "run the same command again once it is up"
            ) from None

    def is_this_machine(self) -> bool:
        """Whether all its nodes run here; the address does not tell, because of tunnels."""
        nodes = self._get("/nodes?view=summary")["data"]["summary"]
        return {node.get("hostname") for node in nodes} == {socket.gethostname()}

    def attempts(self, name: str) -> dict[int, JobDetails]:
        """The attempts at a job by number: those with the submission id `name-NUMBER`."""
        found: dict[int, JobDetails] = {}
        for job_id, job in self._jobs().items():
            start, _, number = job_id.rpartition("-")
            if start == name and number.isdigit():
                found[int(number)] = job
        return found

    def start(
        self,
        job_id: str,
        entrypoint: str,
        package: Path,
        metadata: dict[str, str],
        pip: Sequence[str] = (),
    ) -> bool:
        """Submit a job with the content of a zip as its working directory.

        `pip` are requirements beside those of the image. Returns False if the id is taken: it was
        submitted by someone else at the same time.
        """
        environment: dict[str, Any] = {"working_dir": str(package)}
        environment |= {"pip": list(pip)} if pip else {}
        with self._explained():
            try:
                self._client.submit_job(
                    entrypoint=entrypoint,
                    submission_id=job_id,
                    runtime_env=environment,
                    metadata=metadata,
                )
            except RuntimeError:
                if self.job(job_id) is not None:
                    return False
                raise
        return True

    def job(self, job_id: str) -> JobDetails | None:
        """What the cluster knows of a job, or None."""
        return self._jobs().get(job_id)

    def job_ids(self) -> list[str]:
        return list(self._jobs())

    def _jobs(self) -> dict[str, JobDetails]:
        with self._explained():
            known = self._client.list_jobs()
        return {job.submission_id: job for job in known if job.submission_id}

    def stop(self, job_id: str) -> None:
        """Let Ray end a job; one that is over stays as it is."""
        with self._explained():
            self._client.stop_job(job_id)

    def output(self, job_id: str) -> str:
        with self._explained():
            return self._client.get_job_logs(job_id)

    def follow(self, job_id: str, write: Callable[[str], object]) -> JobDetails:
        """Write the job's output as it comes, to its end, across broken connections.

        Raises:
            LostClusterError: the cluster does not answer for half a minute, or has another head
                that does not know the job.
        """
        shown = failures = 0
        while True:
            shown = asyncio.run(self._tail(job_id, shown, write))
            try:
                with self._explained():
                    job = self._client.get_job_info(job_id)
            except LostClusterError:
                failures += 1
                if failures > _MAX_FAILURES:
                    raise
            except RuntimeError:
                raise LostClusterError(
                    f"the cluster at {self.url} does not know job {job_id} any more: its head was "
                    "replaced; run the same command again to go on"
                ) from None
            else:
                failures = 0
                if job.status.is_terminal():
                    return job
            time.sleep(_PAUSE_S)

    async def _tail(self, job_id: str, shown: int, write: Callable[[str], object]) -> int:
        """Write what follows the first `shown` characters; the new number of characters."""
        seen = 0
        try:
            async for text in self._client.tail_job_logs(job_id):
                new = text[max(shown - seen, 0) :]
                seen += len(text)
                if new:
                    write(new)
        except (RuntimeError, aiohttp.ClientError, OSError):
            pass  # the caller checks the job's status, and tails again if it is still running
        return max(seen, shown)


@contextmanager
def _only_address(url: str) -> Generator[None]:
    """Ray prefers these variables to the address that it is given."""
    names = (ADDRESS_VARIABLE, "RAY_ADDRESS")
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        os.environ[ADDRESS_VARIABLE] = url
        yield
    finally:
        del os.environ[ADDRESS_VARIABLE]
        os.environ.update(before)
