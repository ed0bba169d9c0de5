"""What all tests share: libraries held to one thread each, one real local Ray, one small job."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# Before the first import of numpy, torch or tokenizers, and inherited by Ray's workers.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# The default of 15 starves Ray's workers on a machine that does anything else.
os.environ["RAY_worker_niceness"] = "0"

# A machine that others use too is no reason to fail.
hypothesis.settings.register_profile("shared", deadline=None)
hypothesis.settings.load_profile("shared")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A real Ray of four CPUs for the whole session; started by the first test that asks."""
    import ray

    ray.init(
        address="local",  # whatever RAY_ADDRESS says
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=200_000_000,
        log_to_driver=False,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small pool and target of `small.make_world`."""
    from small import make_world

    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def finished(ray_cluster: None, world: Path) -> dict:
    """The result of one whole job on the small world, in `world/store`: nobody changes it."""
    from small import LEARNING, MODEL, Quiet, parse

    from jobs.run import run_job

    train = {"model": MODEL, "controls": ["random", "conditional_only", "dsir"], **LEARNING}
    return run_job(parse(world, train=train), Quiet())


@pytest.fixture(scope="session")
def given(finished: dict, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The finished job's tokenizer and models as sections of another spec: nothing is trained."""
    folder = tmp_path_factory.mktemp("given")
    artifacts = finished["artifacts"]
    for name in ("tokenizer", "prior", "conditional"):
        shutil.copytree(artifacts[name], folder / name)
    return {name: {"path": str(folder / name)} for name in ("tokenizer", "prior", "conditional")}


@pytest.fixture
def reports(capsys: pytest.CaptureFixture[str]):
    """Calls a verb of the command line in this process: (exit code, what `--json` printed)."""
    from jobs.cli import app

    def call(*arguments: str):
        with pytest.raises(SystemExit) as stopped:
            app([*arguments, "--json"])
        return stopped.value.code, json.loads(capsys.readouterr().out)

    return call
