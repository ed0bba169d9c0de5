"""A mix loses its Mixer, a worker, its driver: it decides the same; or it stops and gets an arm."""

import json
import os
import signal
import subprocess
import time
from contextlib import suppress

import psutil
import pytest
import ray
from drivers import PATIENCE_S, STILLHOUSE
from mixing_world import parse, write_data, write_spec
from small import Quiet

from stillhouse.jobs.run import run_job

STEPS = 40
CHANGES = {
    "train": {"num_steps": STEPS, "evaluate_every": 10},
}

pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("mixfaults"))


@pytest.fixture(scope="module")
def whole(ray_cluster, data):
    """Nothing happens to it."""
    return run_job(parse(data, **CHANGES), Quiet())


class At(Quiet):
    """Does things, each once, when such shares of the run are trained."""

    def __init__(self, acts):
        super().__init__()
        self.acts, self.found, self.place = dict(acts), [], 0.0

    def advance(self, step, done, amount):
        if step == "mix":
            self.place += done
            for share in [share for share in self.acts if self.place >= share]:
                self.found.append(self.acts.pop(share)())


def kill_mixer():
    (name,) = [
        actor
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if actor["name"].startswith("mixer-")
    ]
    ray.kill(ray.get_actor(**name), no_restart=False)
    return name["name"]


def kill_worker():
    workers = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if "WorkerGroupActor" in "".join(process.cmdline()):  # a worker alone trains in it
                workers.append(process)
    os.kill(workers[-1].pid, signal.SIGKILL)
    return workers[-1].pid


def test_mixer_and_worker_are_killed_and_decide_the_same_again(whole, data):
    listener = At({0.3: kill_mixer, 0.6: kill_worker})
    result = run_job(parse(data, store=str(data / "killed"), **CHANGES), listener)
    assert len(listener.found) == 2 and not psutil.pid_exists(listener.found[1])
    assert result["mix"] == whole["mix"]


def test_a_killed_driver_goes_on_with_the_same_decisions(whole, data, ray_cluster):
    store = data / "driver"
    changes = CHANGES | {"store": str(store), "compute": {"address": ray_cluster}}
    path = write_spec(data, "driver", **changes)
    command = [STILLHOUSE, "run", path, "--json"]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + PATIENCE_S
    while not list(store.glob("checkpoints/*/0*[123]0/manifest.json")):
        assert driver.poll() is None and time.monotonic() < deadline
        os.sched_yield()
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert not list(store.glob("runs/*/result.json"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["mix"] == whole["mix"]
