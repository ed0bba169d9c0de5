"""A test's own heads of Ray, with token authentication: killed by id, gone at the end."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

RAY = str(Path(sys.executable).with_name("ray"))
TOKEN = "0123456789abcdef0123456789abcdef"


@dataclass
class Head:
    """A head that runs; `ports` are gcs, dashboard, agent, client and metrics."""

    process: subprocess.Popen
    ports: Sequence[int]

    @property
    def url(self):
        """Its dashboard, which takes jobs."""
        return f"http://127.0.0.1:{self.ports[1]}"

    def kill(self):
        """SIGKILL of everything that it started: what a lost machine is."""
        kill_all(processes_of(self.process.pid))
        self.process.wait()


def kill_all(pids: Iterable[int]):
    """SIGKILL; some may have ended since they were listed."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def free_ports(count):
    """Ports that nobody listens at."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def clean_environment(folder):
    """No Ray, no token, no home of this machine."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return kept | {"HOME": str(folder), "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}


@contextmanager
def running_head(
    environment: Mapping[str, str],
    log: Path,
    ports: Sequence[int],
    options: Sequence[str] = ("--num-cpus=4", "--node-ip-address=127.0.0.1"),
    secret: str | None = TOKEN,
) -> Iterator[Head]:
    """A head that wants `secret`, or what Ray finds in its environment; up when this yields."""
    gcs, dashboard, agent, client, metrics = ports
    with tempfile.TemporaryDirectory(  # sockets need short paths
        prefix="sh", dir="/tmp", ignore_cleanup_errors=True
    ) as folder:
        command = [RAY, "start", "--head", "--block", "--disable-usage-stats", *options]
        command += [f"--port={gcs}", f"--dashboard-port={dashboard}", f"--temp-dir={folder}"]
        command += [f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}"]
        command += [f"--ray-client-server-port={client}", "--dashboard-host=127.0.0.1"]
        command += ["--object-store-memory=200000000"]
        auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secret} if secret else {}
        head = _start(command, {**environment, **auth}, log, ports)
        try:
            yield head
        finally:
            head.process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                head.process.wait(30)
            head.kill()


def _start(command, environment, log, ports):
    """A head that is up: of three, for Ray gives a raylet 30 s, too few on a busy machine."""
    for _ in range(3):
        with open(log, "wb") as out:
            process = subprocess.Popen(
                command, env=environment, stdout=out, stderr=out, start_new_session=True
            )
        head = Head(process, ports)
        if _is_up(head, log):
            return head
        head.kill()
    raise AssertionError(log.read_text())


def _is_up(head, log):
    """Wait until all of it runs and the dashboard answers, or it ended."""
    import requests

    while head.process.poll() is None:
        with suppress(requests.RequestException):
            answer = requests.get(f"{head.url}/api/version", timeout=5).status_code
            if answer in {200, 401} and "Ray runtime started" in log.read_text():
                return True
        time.sleep(0.5)
    return False


def processes_of(leader):
    """Processes of a session; Ray's workers and nodes leave their group, not their session."""
    found = subprocess.run(["ps", "-o", "pid=", "-s", str(leader)], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]
