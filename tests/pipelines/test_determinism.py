"""The same bytes, however many Scorers there are and whoever is killed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from threading import Thread

import psutil
import pytest
from small import Quiet, digests, parse, write_spec

from stillhouse.jobs.run import run_job

STILLHOUSE = str(Path(sys.executable).with_name("stillhouse"))
KINDS = ("tokens", "scores", "selections")
CHANGES = {
    # one sequence at a time: slow enough to be killed in the middle
    "scoring": {"micro_batch": 1},
    "selection": {"tau": 8, "exclude_contaminated": False},
}


def wait_until(true, what, seconds=120):
    """Ask again and again; a condition that never comes true fails the test."""
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.02)
    return found


@pytest.fixture(scope="module")
def changes(given):
    return CHANGES | given


@pytest.fixture(scope="module")
def reference(ray_cluster, world, changes, tmp_path_factory):
    """A store made by two Scorers."""
    store = tmp_path_factory.mktemp("reference") / "store"
    run_job(parse(world, **changes, store=str(store)), Quiet())
    return store


@pytest.fixture
def unscored(reference, tmp_path):
    """A store that has the tokens already: tokens are compared by the whole job's test."""
    for kind in ("scans", "drops", "tokens", "models"):
        shutil.copytree(reference / kind, tmp_path / "store" / kind)
    return tmp_path / "store"


def num_scored(store):
    return len(list((store / "scores" / "receipts").glob("*.json")))


@pytest.mark.parametrize("scorers", [pytest.param(1, marks=pytest.mark.soak), 3])
def test_any_number_of_scorers(world, changes, reference, unscored, scorers):
    compute = {"scorers": scorers, "packers": 1}
    run_job(parse(world, **changes, store=str(unscored), compute=compute), Quiet())
    assert digests(unscored, *KINDS) == digests(reference, *KINDS)


def scorer_processes():
    """The pool's workers of this test session's own Ray, oldest first."""
    family = psutil.Process().children(recursive=True)
    mine = [p for p in family if "PoolWorker" in "".join(p.cmdline())]
    return sorted(mine, key=lambda p: p.pid)


def test_a_scorer_is_killed(world, changes, reference, unscored):
    spec = parse(world, **changes, store=str(unscored))
    heard, made = Quiet(), []
    job = Thread(target=lambda: made.append(run_job(spec, heard)))
    job.start()
    wait_until(lambda: num_scored(unscored) and scorer_processes(), "the first scored part")
    victim = scorer_processes()[0]
    victim.send_signal(signal.SIGKILL)
    before = num_scored(unscored)
    job.join(timeout=200)
    assert made and made[0]["status"] == "done"
    assert not victim.is_running()
    assert before < made[0]["work"]["scores"]["parts"]
    assert digests(unscored, *KINDS) == digests(reference, *KINDS)


@pytest.mark.soak
def test_the_driver_is_killed(world, changes, reference, unscored, tmp_path):
    """And all of its Ray; run again, the job goes on from the parts that are finished."""
    folder = tmp_path / "spec"
    folder.mkdir()
    spec = write_spec(world, **changes, store=str(unscored))
    driver = subprocess.Popen(
        [STILLHOUSE, "run", spec], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_until(lambda: num_scored(unscored) or driver.poll() is not None, "a scored part")
        family = psutil.Process(driver.pid).children(recursive=True)
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    _, alive = psutil.wait_procs(family, timeout=60)
    assert alive == []
    before = num_scored(unscored)
    result = run_job(parse(world, **changes, store=str(unscored)), Quiet())
    assert 0 < before <= result["work"]["scores"]["reused"] < result["work"]["scores"]["parts"]
    assert digests(unscored, *KINDS) == digests(reference, *KINDS)
