"""`stillhouse recommend` reads the records of finished sweeps."""

import json

import pytest
from typer.testing import CliRunner

from stillhouse.jobs.cli import app
from stillhouse.storage.artifact import Store
from stillhouse.storage.run_record import RunRecord

RATES = [0.1, 0.2, 0.3, 0.4]


def put_sweep(folder, name, losses, **changes):
    """A finished record as a sweep leaves it; its last variant failed."""
    record = RunRecord(Store(str(folder)), 8 * name.encode().hex()[:8])
    record.start("job: train\n", "sweep", name=name)
    rows = [
        {"values": {"train.learning_rate": rate}, "status": "done", "metric": loss}
        for rate, loss in zip(RATES, losses, strict=True)
    ]
    rows.append({"values": {"train.learning_rate": 9.0}, "status": "failed", "metric": None})
    sweep = {"metric": "train.heldout_nll", "mode": "min", "variants": rows} | changes
    record.put_result({"status": "done", "job": "train", "run": record.uri, "sweep": sweep})
    record.finish("done")
    return record.uri


@pytest.fixture
def runs(tmp_path):
    """Three tasks of which .2 is the best rate, and one of which .4 is."""
    return [
        put_sweep(tmp_path, "books", [3.0, 1.0, 2.0, 4.0]),
        put_sweep(tmp_path, "laws", [31.0, 11.0, 21.0, 41.0]),
        put_sweep(tmp_path, "news", [6.0, 2.0, 4.0, 8.0]),
        put_sweep(tmp_path, "verse", [3.0, 2.0, 2.5, 1.0]),
    ]


def call(*arguments):
    return CliRunner().invoke(app, ["recommend", *arguments])


def test_each_task_is_left_out_once(runs):
    found = json.loads(call(*runs, "--json").stdout)
    assert [one["name"] for one in found["tasks"]] == ["books", "laws", "news", "verse"]
    assert [one["setting"] for one in found["tasks"]] == [{"train.learning_rate": 0.2}] * 4
    assert [one["regret"] for one in found["tasks"]] == pytest.approx([0, 0, 0, 1])
    # means of the grids: 2.5, 26, 5, 2.125
    assert [one["gain"] for one in found["tasks"]] == pytest.approx([1.5, 15, 3, 0.125])
    assert found["mean_regret"] == pytest.approx(0.25)
    assert found["mean_gain"] == pytest.approx(19.625 / 4)
    assert found["recommended"] == {"train.learning_rate": 0.2}
    shown = call(*runs).stdout
    assert "train.learning_rate 0.2" in shown and "0.25 worse than the best setting" in shown


def test_features_of_the_tasks(runs, tmp_path):
    """A new task as long as verse is recommended what verse was best with."""
    sizes = dict(zip(runs, (900, 1000, 1100, 10), strict=True)) | {"new": 12}
    path = tmp_path / "features.yaml"
    path.write_text(json.dumps({run: {"num_examples": size} for run, size in sizes.items()}))
    found = json.loads(call(*runs, "--features", str(path), "--json").stdout)
    assert found["recommended"] == {"train.learning_rate": 0.4}
    path.write_text(json.dumps({run: {"num_examples": 1} for run in runs[:3]}))
    refused = call(*runs, "--features", str(path))
    assert refused.exit_code == 2 and f"has nothing about {runs[3]}" in refused.stderr
    path.write_text("[]")
    assert "write it as `RUN: {num_examples: 400}`" in call(*runs, "--features", str(path)).stderr


def test_what_the_features_lack_is_named(runs, tmp_path):
    rows = {run: {"num_examples": 1, "num_labels": 2} for run in [*runs, "new"]}
    del rows[runs[0]]["num_labels"], rows["new"]["num_examples"]
    path = tmp_path / "features.yaml"
    path.write_text(json.dumps(rows))
    refused = call(*runs, "--features", str(path))
    assert refused.exit_code == 2
    assert f"{runs[0]} lacks num_labels; new lacks num_examples" in refused.stderr
    rows[runs[0]]["num_labels"], rows["new"]["num_examples"] = "two", 4
    path.write_text(json.dumps(rows))
    refused = call(*runs, "--features", str(path))
    assert refused.exit_code == 2 and f"{runs[0]}: write it as" in refused.stderr


def test_a_sweep_given_twice(runs, tmp_path):
    name = runs[0].rsplit("/", 1)[-1]
    for again in (runs[0], f"{runs[0]}/", f"{tmp_path}/../{tmp_path.name}/runs/{name}", name[:9]):
        refused = call(*runs, again, "--store", str(tmp_path))
        assert refused.exit_code == 2
        assert f"{again} is the same sweep as {runs[0]}" in refused.stderr


def test_runs_that_cannot_be_compared(runs, tmp_path):
    other = put_sweep(tmp_path, "accuracy", [1.0, 2.0, 3.0, 4.0], mode="max")
    refused = call(*runs, other)
    assert refused.exit_code == 2 and "give sweeps of the same metric" in refused.stderr
    few = call(*runs[:2])
    assert few.exit_code == 2 and "leaving one out needs at least 3" in few.stderr
    none = call(*runs, str(tmp_path / "runs" / "nothing"))
    assert none.exit_code == 3 and "is no finished sweep" in none.stderr
