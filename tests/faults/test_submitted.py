"""A head with token authentication in a process of its own, and jobs submitted from others."""

import json
import signal
import subprocess
from functools import partial

import pytest
from drivers import STILLHOUSE
from heads import TOKEN, clean_environment, free_ports, running_head
from small import make_models, make_world, own_packages, write_shard, write_spec

from stillhouse import open_selection

PATIENCE_S = 600


@pytest.fixture
def environment(tmp_path):
    """Where packages of our folders' names come first on the path, which no process may import."""
    return clean_environment(tmp_path) | {"PYTHONPATH": str(own_packages(tmp_path / "project"))}


@pytest.fixture
def address(environment, tmp_path):
    """The dashboard of a running head that wants TOKEN."""
    with running_head(environment, tmp_path / "head.log", free_ports(5)) as head:
        yield head.url


@pytest.mark.soak
def test_submit_to_a_real_cluster(address, environment, tmp_path):
    make_world(tmp_path, shards=2)
    (tmp_path / "models").mkdir()
    spec = write_spec(tmp_path, publish="sea", **make_models(tmp_path / "models"))

    token = environment | {"RAY_AUTH_TOKEN": TOKEN}

    def submit(*options, env=token, sent=None, as_json=True):
        command = [STILLHOUSE, "submit", spec, "--address", address, *options]
        command += ["--json"] if as_json else []
        process = subprocess.Popen(
            command,
            cwd=tmp_path / "project",
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # not ours: `&`'s
        )
        lines = []
        if sent is not None:
            while not lines or sent not in lines[-1]:
                line = process.stderr.readline()
                assert line, "".join(lines)
                lines.append(line)
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE_S)
        return process.returncode, json.loads(out) if as_json else out, "".join(lines) + err

    code, found, _ = submit(env=environment)
    assert (code, "wants a token" in found["error"]) == (2, True)
    code, found, error = submit(env=environment | {"RAY_AUTH_TOKEN": "f" * 32})
    assert (code, "refuses the token from RAY_AUTH_TOKEN" in found["error"]) == (2, True)
    assert "f" * 32 not in error

    code, first, error = submit("--follow", sent="parts")
    assert (code, first["attempt"], first["attached"], first["state"]) == (4, 1, False, "RUNNING")
    assert "the job goes on; come back with: stillhouse submit" in error
    code, printed, error = submit(as_json=False)
    assert (code, printed) == (0, first["job_id"] + "\n")  # for `ID=$(stillhouse submit ...)`
    assert "attached to job" in error and "next:   stillhouse submit" in error
    short = [STILLHOUSE, "status", first["job_id"][:12], "--address", address, "--json"]
    found = subprocess.run(short, cwd=tmp_path, env=token, capture_output=True, text=True)
    assert json.loads(found.stdout)["job_id"] == first["job_id"], found.stderr
    code, again, error = submit("--follow", "--set", "compute.scorers=1")
    assert (code, again["job_id"], again["attached"]) == (0, first["job_id"], True)
    assert again["state"] == "SUCCEEDED"
    assert 0 < first["sent_bytes"] < 600_000

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
