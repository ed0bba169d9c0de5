"""A training whose driver is killed, and one that loses a node: equal samples and losses."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from drivers import KEYS, PATIENCE_S, STILLHOUSE, Bench, Driver, Job
from small import make_world

from stillhouse.storage.filesystem import list_names

STEPS = 240


@pytest.fixture(scope="module")
def place(tmp_path_factory, untrained):
    folder = make_world(tmp_path_factory.mktemp("train"), shards=1, per_shard=160)
    return folder, untrained["tokenizer"]


def spec_of(place, store, changes=None, **compute):
    folder, tokenizer = place
    return {
        "job": "train",
        "store": str(folder / store),
        "data": {"path": str(folder / "pool")},
        "tokenizer": tokenizer,
        "sequence_length": 32,
        "part_tokens": 2000,
        "model": {"hidden_size": 32, "num_layers": 1},
        "heldout": {"path": str(folder / "target")},
        "train": {"num_tokens": STEPS * 8 * 32, "global_batch": 8, "checkpoint_every": 20},
        "compute": {"trainers": 2, "packers": 1} | compute,
    } | (changes or {})


def start(place, store, number, changes=None, **environment):
    folder = place[0] / f"{store}-{number}"
    path = place[0] / f"{store}-{number}.yaml"
    path.write_text(yaml.safe_dump(spec_of(place, store, changes)))
    environment = os.environ | {"RAY_TMPDIR": f"/tmp/sh-{os.getpid()}-{number}"} | environment
    return Driver([STILLHOUSE, "run", str(path), "--json"], folder, environment)


def manifest(result):
    return json.loads(Path(result["artifacts"]["model"], "manifest.json").read_text())


@pytest.fixture(scope="module")
def whole(place):
    code, result, errors = start(place, "whole", 0).end()
    assert code == 0, errors
    return result


@pytest.mark.soak
def test_a_killed_driver_goes_on_where_its_training_was(place, whole):
    driver = start(place, "killed", 1)
    checkpoints = place[0] / "killed" / "checkpoints"
    deadline = time.monotonic() + PATIENCE_S
    while not any("00000040" in list_names(str(name)) for name in checkpoints.glob("*")):
        assert driver.process.poll() is None and time.monotonic() < deadline
        os.sched_yield()
    driver.kill()
    code, result, errors = start(place, "killed", 2).end()
    assert code == 0, errors
    assert manifest(result)["files"] == manifest(whole)["files"]
    starts = manifest(result)["totals"]["measured"]["starts"]
    assert len(starts) == 2 and starts[1]["step"] >= 20
    assert result["train"]["order_sha256"] == whole["train"]["order_sha256"]


@pytest.mark.soak
def test_on_s3_it_is_the_same_model(place, whole, s3_server):
    bench = Bench(Job(place[0], {}), s3_server, place[0])
    bucket = bench.bucket()
    bench.upload(bucket, "pool", "target")
    at = f"s3://{bucket}/"
    changes = {
        "store": f"{at}store",
        "data": {"path": f"{at}pool"},
        "heldout": {"path": f"{at}target"},
    }
    code, result, errors = start(place, "s3", 3, changes, **KEYS, AWS_ENDPOINT_URL=s3_server).end()
    assert code == 0, errors
    model = result["artifacts"]["model"].removeprefix(at)
    made = json.loads(bench.objects(bucket)[f"{model}/manifest.json"])
    assert made["files"] == manifest(whole)["files"]
    assert result["train"]["order_sha256"] == whole["train"]["order_sha256"]


@pytest.mark.soak
def test_a_lost_node_leaves_fewer_workers(place, whole):
    content = spec_of(place, "node", trainers=4, min_trainers=1)
    script = str(Path(__file__).parent / "lost_node.py")
    done = subprocess.run(
        [sys.executable, script, json.dumps(content)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["starts"][0] == 4 and found["starts"][-1] < 4
    train = found["result"]["train"]
    assert train["order_sha256"] == whole["train"]["order_sha256"]
    assert train["heldout_nll"] == pytest.approx(whole["train"]["heldout_nll"], rel=1e-4)
