"""A chain whose driver is killed goes on: finished steps are found, the rest ends as unharmed."""

import json
import os
import tempfile
import time
from pathlib import Path

import pytest
import yaml
from drivers import STILLHOUSE, Driver
from small import LEARNING, MODEL, make_world

pytestmark = pytest.mark.soak
PATIENCE_S = 280
SHORT = {"dtype": "float32", **LEARNING}


def write_chain(folder):
    """A base, which a second training goes on from."""
    data = {"path": str(folder / "pool" / "*.parquet")}
    base = {
        "job": "train",
        "data": data,
        "sequence_length": 32,
        "tokenizer": {"train": {"vocab_size": 300}},
        "model": MODEL,
        "train": {"num_tokens": 32 * 8 * 5, **SHORT},
    }
    more = {"num_tokens": 32 * 8 * 800, "checkpoint_every": 40, "keep_last": 50, **SHORT}
    target = {"job": "train", "data": data, "sequence_length": 32, "init": {"from": "base"}}
    steps = {"base": base, "target": target | {"train": more}}
    path = folder / "chain.yaml"
    compute = {"trainers": 1, "packers": 1}
    content = {"job": "chain", "store": str(folder / "store"), "compute": compute, "steps": steps}
    path.write_text(yaml.safe_dump(content))
    return path


def start(folder, number, *more):
    arguments = [STILLHOUSE, "run", str(folder / "chain.yaml"), "--json", *more]
    environment = os.environ | {"RAY_TMPDIR": tempfile.mkdtemp(prefix="sh-")}
    return Driver(arguments, folder / f"driver-{number}", environment)


def wait_for(found):
    limit = time.monotonic() + PATIENCE_S
    while not found():
        assert time.monotonic() < limit
        time.sleep(0.05)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("chain"), shards=1, per_shard=60)
    write_chain(folder)
    return folder


def test_a_driver_that_is_killed_in_the_second_step(folder):
    driver = start(folder, 0)
    checkpoints = folder / "store" / "checkpoints"
    # the target's second checkpoint: the base has one at step 5
    wait_for(lambda: any(int(p.name) >= 80 for p in checkpoints.glob("*/*") if p.name.isdigit()))
    driver.kill()
    [chain] = [
        json.loads(path.read_text())
        for path in (folder / "store" / "runs").glob("*/status.json")
        if json.loads(path.read_text())["job"] == "chain"
    ]
    assert chain["steps"]["base"]["state"] == "done"
    code, found, errors = start(folder, 1).end()
    assert code == 0, errors
    steps = found["chain"]["steps"]
    assert [one["status"] for one in steps.values()] == ["reused", "done"]
    target = json.loads(Path(steps["target"]["artifact"], "manifest.json").read_text())
    starts = target["totals"]["measured"]["starts"]
    assert starts[0]["step"] == 0 and starts[1]["step"] >= 80
    # another store, nothing killed
    code, unharmed, errors = start(folder, 2, "--set", f"store={folder / 'other'}").end()
    assert code == 0, errors
    for name in ("base", "target"):
        mine, other = (Path(one["chain"]["steps"][name]["artifact"]) for one in (found, unharmed))
        assert mine.name == other.name
        weights = [(one / "model.safetensors").read_bytes() for one in (mine, other)]
        assert weights[0] == weights[1]


def test_what_json_says_when_a_step_fails(folder):
    sets = ("--set", "steps.target.train.learning_rate=1.0e+30")
    code, found, errors = start(folder, 3, *sets, "--set", f"store={folder / 'store'}").end()
    assert code == 4
    assert "error: step `target`: step " in errors
    assert found["status"] == "error" and "lower `learning_rate`" in found["error"]
    steps = found["chain"]["steps"]
    assert steps["base"]["status"] == "reused" and Path(steps["base"]["artifact"]).is_dir()
    assert steps["target"]["status"] == "failed"
