"""Distil jobs that lose workers or their driver end in the bytes of one that lost nothing."""

import hashlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from time import monotonic, sleep

import psutil
import pytest
import yaml
from small import Quiet

from stillhouse.distillation.spec import DistillSpec
from stillhouse.jobs.run import run_job

pytestmark = pytest.mark.soak

CONTENT = {
    "job": "distill",
    "data": {"dataset": "digits", "num_images": 300},
    "network": {"name": "convnet", "depth": 2, "width": 8},
    "preprocessing": {"augmentation": ["crop", "scale"]},
    "experts": {"count": 6, "epochs": 12, "batch_size": 32},
    "method": {
        "name": "mtt",
        "images_per_class": 1,
        "num_iterations": 30,
        "num_steps": 10,
        "evaluate_every": 10,
    },
    "evaluate": {"seeds": 1, "epochs": 2},
}


def contents(store):
    """sha256 of trajectories and of sets, by path; receipts tell how long it took."""
    files = [*store.glob("trajectories/*/*"), *store.glob("distilled/**/*.parquet")]
    return {
        str(p.relative_to(store)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in files
        if p.is_file() and p.parent.name != "receipts"
    }


def contents_after(store, distillers=1, listener=None):
    """What a job leaves in its store."""
    content = CONTENT | {"store": str(store), "compute": {"distillers": distillers}}
    run_job(DistillSpec.model_validate(content), listener or Quiet())
    return contents(store)


@pytest.fixture(scope="module")
def undisturbed(ray_cluster, tmp_path_factory):
    """The contents of a store where nothing was killed."""
    return contents_after(tmp_path_factory.mktemp("undisturbed"))


TITLES = {
    "experts": ["ray::PoolWorker.do"],
    "distil": ["ray::RayTrainWorker", "ray::WorkerGroupActor"],  # a group of one is its actor
}


class Killer(Quiet):
    """Kills an actor that is at work, once a step, when the step has got somewhere."""

    def __init__(self):
        super().__init__()
        self.killed = {}

    def advance(self, step, done, amount):
        super().advance(step, done, amount)
        if step not in TITLES or step in self.killed or (step == "distil" and self.share() < 1.2):
            return
        found = [(p, " ".join(p.cmdline())) for p in psutil.Process().children(recursive=True)]
        at_work = [p for title in TITLES[step] for p, line in found if title in line]
        if at_work:
            self.killed[step] = at_work[0].pid
            os.kill(at_work[0].pid, signal.SIGKILL)

    def share(self):
        """Points of the distillation so far."""
        return sum(done for step, done, _ in self.advanced if step == "distil")


def test_killed_workers_change_no_byte(undisturbed, tmp_path):
    killer = Killer()
    assert contents_after(tmp_path, listener=killer) == undisturbed
    assert set(killer.killed) == {"experts", "distil"}


def test_one_of_two_distillers_is_killed_and_both_go_on_from_the_checkpoint(ray_cluster, tmp_path):
    alone, killer = contents_after(tmp_path / "alone", distillers=2), Killer()
    assert contents_after(tmp_path / "killed", distillers=2, listener=killer) == alone
    assert "distil" in killer.killed


def test_killed_driver_redoes_the_experts_in_flight_alone(undisturbed, tmp_path):
    store, file = tmp_path / "store", tmp_path / "spec.yaml"
    content = CONTENT | {"store": str(store), "compute": {"experts": 2}}
    file.write_text(yaml.safe_dump(content))
    command = [str(Path(sys.executable).with_name("stillhouse")), "run", str(file), "--json"]
    with tempfile.TemporaryDirectory(prefix="sh-", ignore_cleanup_errors=True) as folder:
        driver = subprocess.Popen(
            command, env=os.environ | {"RAY_TMPDIR": folder}, start_new_session=True
        )
        try:
            wait_for(lambda: len(receipts(store)) >= 2 or driver.poll() is not None)
            family = psutil.Process(driver.pid).children(recursive=True)
        finally:
            driver.kill()
            driver.wait()
        _, alive = psutil.wait_procs(family, 120)  # until then its workers may still write
        assert not alive
    finished = len(receipts(store))
    assert 2 <= finished < 6
    listener = Quiet()
    run_job(DistillSpec.model_validate(content), listener)
    assert ("experts", 6, finished) in listener.steps
    assert contents(store) == undisturbed


def receipts(store):
    return [*store.glob("trajectories/receipts/*.json")]


def wait_for(condition, seconds=120):
    """Looks ten times a second."""
    end = monotonic() + seconds
    while not condition():
        assert monotonic() < end, "nothing happened"
        sleep(0.1)
