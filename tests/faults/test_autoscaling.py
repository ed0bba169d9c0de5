"""A job on a cluster that has no worker yet: nodes come for it, and go when they are idle."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml
from drivers import PATIENCE_S, STILLHOUSE
from heads import clean_environment, free_ports, kill_all, processes_of
from small import small_spec

UNTIL_IDLE = """
import sys, time, ray
ray.init(address=sys.argv[1], log_to_driver=False)
while sum(node["Alive"] for node in ray.nodes()) > 1:
    time.sleep(1)
print(len(ray.nodes()))
"""


@pytest.fixture
def scaled(tmp_path):
    """The address of a head without CPUs that may start two nodes of two CPUs; its environment."""
    environment = clean_environment(tmp_path) | {"RAY_AUTH_MODE": "disabled"}
    script = Path(__file__).with_name("scaled_head.py")
    for _ in range(3):  # Ray gives a raylet 30 s to start, too few on a busy machine
        with tempfile.TemporaryDirectory(prefix="sh", ignore_cleanup_errors=True) as folder:
            command = [
                sys.executable,
                str(script),
                folder,
                str(free_ports(1)[0]),
                '{"CPU": 2}',
                "2",
            ]
            head = subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
            )
            try:
                address = head.stdout.readline().strip()
                if address:
                    yield address, environment
                    return
            finally:
                kill_all(processes_of(head.pid))
                head.wait()
    pytest.fail("the head did not start")


@pytest.mark.soak
def test_nodes_come_for_a_job_and_go(job, expected, bench, scaled, tmp_path):
    address, environment = scaled
    store, spec = tmp_path / "store", tmp_path / "spec.yaml"
    compute = {"scorers": 3, "packers": 3, "trainers": 1, "address": address}
    changes = {"store": str(store), "part_tokens": 8000, "compute": compute}
    spec.write_text(yaml.safe_dump(small_spec(job.folder, **job.models, **changes)))

    def call(*command):
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    assert call(STILLHOUSE, "run", str(spec), "--json")["status"] == "done"
    assert bench.contents(str(store)) == expected
    started = call(sys.executable, "-c", UNTIL_IDLE, address)
    assert started >= 2  # nodes ever, the head among them
