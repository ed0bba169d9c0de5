"""A head with token authentication in a process of its own, and jobs submitted from others."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest
from drivers import STILLHOUSE
from small import make_models, make_world, write_shard, write_spec

from stillhouse import open_selection

RAY = str(Path(sys.executable).with_name("ray"))
TOKEN = "0123456789abcdef0123456789abcdef"
PATIENCE_S = 600


def free_ports(count):
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture
def environment(tmp_path):
    """No Ray, no token, no home of this machine."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return kept | {"HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def address(environment, tmp_path):
    """The dashboard of a running head that wants TOKEN."""
    gcs, dashboard, agent, client, metrics = free_ports(5)
    with tempfile.TemporaryDirectory(prefix="sh", dir="/tmp") as folder:  # sockets need short paths
        command = [RAY, "start", "--head", "--block", "--num-cpus=4", "--disable-usage-stats"]
        command += [f"--port={gcs}", f"--dashboard-port={dashboard}", f"--temp-dir={folder}"]
        command += [f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}"]
        command += [f"--ray-client-server-port={client}", "--node-ip-address=127.0.0.1"]
        command += ["--dashboard-host=127.0.0.1", "--object-store-memory=200000000"]
        secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
        with open(tmp_path / "head.log", "wb") as log:
            head = subprocess.Popen(
                command, env=environment | secret, stdout=log, stderr=log, start_new_session=True
            )
        try:
            url = f"http://127.0.0.1:{dashboard}"
            wait_for(url, head)
            yield url
        finally:
            os.killpg(head.pid, signal.SIGTERM)
            try:
                head.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(head.pid, signal.SIGKILL)
                head.wait()


def wait_for(url, head):
    """Ask until the dashboard answers; a head that ended is an error at once."""
    import requests

    while True:
        assert head.poll() is None, "the head ended"
        try:
            if requests.get(f"{url}/api/version", timeout=5).status_code in {200, 401}:
                return
        except requests.RequestException:
            continue


@pytest.mark.soak
def test_submit_to_a_real_cluster(address, environment, tmp_path):
    make_world(tmp_path, shards=2)
    (tmp_path / "models").mkdir()
    spec = write_spec(tmp_path, publish="sea", **make_models(tmp_path / "models"))

    def submit(*options, env=environment | {"RAY_AUTH_TOKEN": TOKEN}, sent=None):
        command = [STILLHOUSE, "submit", spec, "--address", address, "--json", *options]
        process = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        lines = []
        if sent is not None:
            while not lines or sent not in lines[-1]:
                line = process.stderr.readline()
                assert line, "".join(lines)
                lines.append(line)
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE_S)
        return process.returncode, json.loads(out), "".join(lines) + err

    code, found, _ = submit(env=environment)
    assert (code, "wants a token" in found["error"]) == (2, True)
    code, found, error = submit(env=environment | {"RAY_AUTH_TOKEN": "f" * 32})
    assert (code, "refuses the token from RAY_AUTH_TOKEN" in found["error"]) == (2, True)
    assert "f" * 32 not in error

    code, first, error = submit("--follow", sent="parts")
    assert (code, first["attempt"], first["attached"], first["state"]) == (4, 1, False, "RUNNING")
    assert "the job goes on; come back with: stillhouse submit" in error
    code, again, error = submit("--follow", "--set", "compute.scorers=1")
    assert (code, again["job_id"], again["attached"]) == (0, first["job_id"], True)
    assert again["state"] == "SUCCEEDED"
    assert first["sent_bytes"] < 1_000_000

    published = open_selection(f"{tmp_path}/store#sea")
    assert published.num_rows > 0
    code, third, error = submit("--follow")
    assert (code, third["attempt"], third["state"]) == (0, 2, "SUCCEEDED")
    assert "nothing to do" in error
    write_shard(tmp_path, 7, per_shard=40)
    code, _, error = submit("--follow")
    assert (code, open_selection(f"{tmp_path}/store#sea").uri != published.uri) == (0, True)

    too_much = ["--set", "selection={num_tokens: 900000000}"]
    code, refused, _ = submit("--follow", *too_much)
    assert (code, "in use by another spec" in refused["error"]) == (2, True)
    code, failed, error = submit("--follow", *too_much, "--set", "publish=null")
    assert (code, failed["state"]) == (2, "FAILED")
    assert failed["message"] == "exit code 2"
    assert "error: " in error and TOKEN not in error
    for path in (tmp_path / "store").rglob("*"):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes()
