"""Workers of a distil job that are lost, sent home at work, or cannot begin, on a real Ray."""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from time import monotonic, sleep

import pytest
from ray.cloudpickle import register_pickle_by_value
from small import Quiet

from stillhouse.actors.image_worker import ImageCall, ImageWork
from stillhouse.distillation.matching_job import MatchingTask
from stillhouse.distillation.methods import Mtt
from stillhouse.distillation.spec import NetworkSettings
from stillhouse.errors import ClusterError, ModelError, PartFailedError
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.crew import Crew
from stillhouse.pipelines.distilling import distil
from stillhouse.spec import ComputeSettings
from stillhouse.storage.artifact import Receipt, Store

pytestmark = pytest.mark.soak
register_pickle_by_value(sys.modules[__name__])  # workers do not see this folder

HERE = ImageWork("1" * 64, False, "cpu", 0, 1)


@dataclass(frozen=True)
class Errand:
    """What a task does: `deaths` processes die of it, then it waits, fails or is done."""

    fingerprint: str
    folder: str
    deaths: int = 0
    missing: str | None = None
    refused: bool = False
    waits: bool = False


def run_errand(store, errand):
    died = Path(errand.folder, errand.fingerprint)
    count = len(died.read_text()) if died.exists() else 0
    if count < errand.deaths:
        died.write_text("x" * (count + 1))
        os._exit(1)
    if errand.missing:
        __import__(errand.missing)
    if errand.waits:
        died.write_text("here")
        sleep(600)
    if errand.refused:
        until(Path(errand.folder, "b" * 64).exists)
        raise ModelError("no such network")
    return store.put_receipt("distilled", Receipt(errand.fingerprint, (), {}))


def until(condition):
    end = monotonic() + 60
    while not condition():
        assert monotonic() < end
        sleep(0.05)


def errands(folder, work=HERE, cpus=1, workers=2, **of_first):
    """A crew does three errands."""
    compute = ComputeSettings(cpus_per_worker=cpus)
    ctx = Context(Store(str(folder / "store")), compute, Quiet())
    tasks = [Errand("a" * 64, str(folder), **of_first)]
    tasks += [Errand(name * 64, str(folder)) for name in "cd"]
    calls = [ImageCall(run_errand, task, prepared=False) for task in tasks]
    with Crew(ctx, work) as crew:
        return crew.do("errands", "distilled", calls, workers=workers)


def test_more_workers_than_the_cluster_has_room_for(ray_cluster, tmp_path):
    """A task of one that waits for a node would wait for ever: the others stay for later steps."""
    assert [r.task[0] for r in errands(tmp_path, cpus=3, workers=3)] == ["a", "c", "d"]


def test_a_lost_worker_is_made_again_and_its_task_done(ray_cluster, tmp_path):
    assert [receipt.task[0] for receipt in errands(tmp_path, deaths=2)] == ["a", "c", "d"]


def test_a_task_that_kills_every_worker_is_given_up(ray_cluster, tmp_path):
    with pytest.raises(PartFailedError, match=r"a{64} killed its worker 3 times"):
        errands(tmp_path, deaths=9)


def test_a_package_that_workers_lack_is_named_in_a_line(ray_cluster, tmp_path):
    with pytest.raises(ClusterError, match=r"No module named 'h7_lacking'.*`compute.address`") as e:
        errands(tmp_path, missing="h7_lacking")
    assert "\n" not in str(e.value)


@pytest.fixture
def lonely(tmp_path, monkeypatch):
    """Work of a class that is in a module of this process alone."""
    (tmp_path / "h7_lonely.py").write_text(
        "from stillhouse.actors.image_worker import ImageWork\nclass Lonely(ImageWork): ..."
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    from h7_lonely import Lonely

    return Lonely("1" * 64, False, "cpu", 0, 1)


def test_a_worker_that_cannot_begin_says_why_in_a_line(ray_cluster, tmp_path, lonely):
    with pytest.raises(
        ClusterError, match=r"cannot be started: .*No module named 'h7_lonely'"
    ) as e:
        errands(tmp_path, lonely)
    assert "\n" not in str(e.value) and e.value.exit_code == 2


@pytest.mark.parametrize("distillers", [1, 2])
def test_distillers_that_cannot_begin_are_no_lost_ones(ray_cluster, tmp_path, lonely, distillers):
    method = Mtt(name="mtt", images_per_class=1)
    task = MatchingTask("2" * 64, NetworkSettings(), method, (), 3, ())
    ctx = Context(Store(str(tmp_path)), ComputeSettings(distillers=distillers), Quiet())
    with pytest.raises(ClusterError, match=r"cannot be started: .*No module named 'h7_lonely'"):
        distil(ctx, lonely, task)


def test_who_is_sent_home_at_work_is_not_said_to_be_tried_again(tmp_path):
    """In a process of its own, for what it prints: one task fails while another one is at work."""
    script = """
        import ray
        from test_crew import *
        ray.init(address="local", num_cpus=2, include_dashboard=False)
        folder = Path(r"FOLDER")
        ctx = Context(Store(str(folder / "store")), ComputeSettings(), Quiet())
        waiting = Errand("b" * 64, str(folder), waits=True)
        tasks = waiting, Errand("c" * 64, str(folder), refused=True)
        calls = [ImageCall(run_errand, task, prepared=False) for task in tasks]
        try:
            with Crew(ctx, HERE) as crew:
                crew.do("errands", "distilled", calls, workers=2)
        except ModelError as error:
            print("raised", error)
        sleep(2)  # what the raylet has to say takes a moment
    """
    tests = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    path = os.pathsep.join([*tests, *sys.path])
    with tempfile.TemporaryDirectory(prefix="sh-", ignore_cleanup_errors=True) as folder:
        done = subprocess.run(
            [sys.executable, "-c", dedent(script).replace("FOLDER", str(tmp_path))],
            env=os.environ | {"PYTHONPATH": path, "RAY_TMPDIR": folder},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert "raised no such network" in done.stdout
    assert "retr" not in done.stdout + done.stderr
