"""The example of a chain on S3, its driver killed in every step: as if nothing had happened."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALLER = {
    "base": {"train": {"num_tokens": 40_000}},
    "choose": {"selection": {"tau": 4}},
    "teacher": {"train": {"num_tokens": 40_000}},
    "target": {"train": {"num_tokens": 40_000}},
    "skills": {"train": {"num_steps": 12, "evaluate_every": 6}},
}
MOMENTS = ("checkpoints/", "scores/receipts/", "models/", "signals/receipts/", "checkpoints/")
"""The driver is killed soon after the next objects of such a name: in the base, the selection, the
teacher, its signals, and the target or the tasks.
"""
PATIENCE_S = 600


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for arguments in (
        ["build_corpus.py", "--out", str(folder), "--max-mb", "2"],
        ["build_tasks.py", "--out", str(folder / "tasks")],
    ):
        subprocess.run([sys.executable, str(EXAMPLES / arguments[0]), *arguments[1:]], check=True)
    return folder


def chain(data, store):
    """The example with smaller steps, on one worker, whose bytes can be compared.

    In the file its steps are sorted by name: a step may stand before those that it needs.
    """
    text = (EXAMPLES / "chain.yaml").read_text().replace("examples/data", str(data))
    content = yaml.safe_load(text)
    for name, smaller in SMALLER.items():
        for section, changes in smaller.items():
            content["steps"][name].setdefault(section, {}).update(changes)
    compute = {"scorers": 1, "trainers": 1, "packers": 1}
    return content | {"store": store, "compute": compute}


def files(bench, bucket, artifact):
    """Bytes of an artifact's files, without what was measured."""
    folder = artifact.removeprefix(f"s3://{bucket}/")
    found = bench.objects(bucket).items()
    return {
        key.removeprefix(folder): content
        for key, content in found
        if key.startswith(f"{folder}/") and not key.endswith("manifest.json")
    }


@pytest.mark.soak
def test_killed_in_every_step_it_ends_as_if_nothing_had_happened(bench, data):
    whole, broken = bench.bucket(), bench.bucket()
    code, unharmed, errors = bench.launch(chain(data, f"s3://{whole}/store")).end(PATIENCE_S)
    assert code == 0, errors
    spec = chain(data, f"s3://{broken}/store")
    kills = 0
    for name in MOMENTS:
        before = {key for key in bench.keys(broken) if f"/{name}" in key}
        driver = bench.launch(spec)
        limit = time.monotonic() + PATIENCE_S
        while driver.process.poll() is None:
            assert time.monotonic() < limit
            if {key for key in bench.keys(broken) if f"/{name}" in key} - before:
                driver.kill()
                kills += 1
                break
            time.sleep(0.2)
        else:  # it ended before
            code, _, errors = driver.end()
            assert code == 0, errors
    assert kills >= 4
    code, found, errors = bench.launch(spec).end(PATIENCE_S)
    assert code == 0, errors
    steps, expected = found["chain"]["steps"], unharmed["chain"]["steps"]
    assert {*steps} == {"base", "choose", "teacher", "target", "skills"}
    assert steps["base"]["status"] == "reused"
    for name, step in steps.items():
        mine = files(bench, broken, step["artifact"])
        theirs = files(bench, whole, expected[name]["artifact"])
        assert mine == theirs and mine, name
    code, again, errors = bench.launch(spec).end(PATIENCE_S)
    assert (code, again["status"]) == (0, "nothing_to_do"), errors
    assert bench.verify(f"s3://{broken}/store")[0] == 0
