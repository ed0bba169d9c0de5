"""All jobs on a Ray that declares GPUs which are not there, with `device: cpu`.

All that Ray and torch check about placement on GPUs is met, and `compute.device` alone decides
where it is computed and which backend sums.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from mixing_job import parse as mix_spec
from mixing_job import write_data
from small import LEARNING, MODEL, make_models, make_world, small_spec

HERE = Path(__file__).parent
GIVEN = ("tokenizer", "prior", "conditional")


@pytest.fixture(scope="module")
def gpu_ray():
    """Runs a spec on the declared GPUs, in a process with a Ray of its own: its result."""
    path = os.pathsep.join([str(HERE), str(HERE.parent), *sys.path])
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with (
        tempfile.TemporaryDirectory(prefix="sh-", ignore_cleanup_errors=True) as folder,
        subprocess.Popen(
            [sys.executable, str(HERE / "declared_gpus.py")],
            env=kept | {"PYTHONPATH": path, "RAY_TMPDIR": folder},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process,
    ):

        def run(content):
            print(json.dumps(content), file=process.stdin, flush=True)
            said = json.loads(process.stdout.readline())
            assert "error" not in said, said
            return said["result"]

        yield run
        process.stdin.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A pool, a target and models, with the mixing job's data beside them."""
    folder = make_world(tmp_path_factory.mktemp("gpus"), shards=2, per_shard=60)
    make_models(folder)
    (folder / "mix").mkdir()
    write_data(folder / "mix")
    return folder


def on_gpus(gpus, **widths):
    return {"device": "cpu", "gpus_per_worker": gpus, "packers": 1, **widths}


def select_spec(place, compute):
    given = {name: {"path": str(place / name)} for name in GIVEN}
    train = {"model": MODEL, **LEARNING, "num_tokens": 1000}
    return small_spec(place, **given, train=train, compute=compute) | {
        "store": str(place / f"gpus-{compute['gpus_per_worker']}")
    }


def online_spec(place, kept, compute):
    return {
        "job": "train",
        "store": str(place / "store"),
        "data": {"selection": kept["artifacts"]["selection"]},
        "model": MODEL,
        "train": {"select": "online", **LEARNING},
        "online": {name: {"path": str(place / name)} for name in GIVEN[1:]} | {"tau": 2},
        "compute": compute,
    }


def distill_spec(place, compute):
    method = {"name": "mtt", "images_per_class": 2, "num_iterations": 4, "num_steps": 3}
    return {
        "job": "distill",
        "store": str(place / "store"),
        "data": {"dataset": "digits", "num_images": 300},
        "network": {"name": "convnet", "depth": 2, "width": 4},
        "experts": {"count": 2, "epochs": 3, "batch_size": 128},
        "method": method | {"evaluate_every": 2},
        "evaluate": {"seeds": 2, "epochs": 4},
        "compute": compute,
    }


@pytest.fixture(scope="module")
def kept(gpu_ray, place):
    """A selection by scorers that share GPUs, and its target model."""
    return gpu_ray(select_spec(place, on_gpus(0.5, scorers=2, trainers=2)))


def test_select(kept):
    assert kept["status"] == "done"


def test_online_selection(gpu_ray, place, kept):
    compute = on_gpus(0.5, scorers=2, trainers=2)
    assert gpu_ray(online_spec(place, kept, compute))["status"] == "done"


def test_mix(gpu_ray, place):
    compute = on_gpus(1, trainers=2)
    spec = mix_spec(place / "mix", compute=compute)
    assert gpu_ray(spec.model_dump(mode="json", by_alias=True))["status"] == "done"


def test_distill(gpu_ray, place):
    compute = on_gpus(1, distillers=2, experts=2)
    assert gpu_ray(distill_spec(place, compute))["status"] == "done"
