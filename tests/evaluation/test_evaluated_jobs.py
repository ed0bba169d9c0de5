"""`evaluate` in jobs: what is measured when, found again, and refused before a training."""

import json
import math
import shutil
from pathlib import Path

import pytest
from small import LEARNING, MODEL, STYLES, Quiet, make_world, parse, small_training

from stillhouse.errors import SpecError
from stillhouse.jobs.kinds import _gpus_of
from stillhouse.jobs.paths import refuse_local_paths
from stillhouse.jobs.plan import plan_job
from stillhouse.jobs.run import run_job
from stillhouse.report.page import read
from stillhouse.storage.artifact import Store
from stillhouse.storage.parquet import read_table
from stillhouse.text.pieces import read_pieces, token_ids
from stillhouse.text.tokenizer import load_tokenizer
from stillhouse.training.spec import TrainSpec

STEPS = 24


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A file of rows: which word comes next in a style's list."""
    path = tmp_path_factory.mktemp("tasks") / "next.jsonl"
    words = STYLES["sea"]
    rows = [
        {"input": " ".join(words[at : at + 3]), "target": words[at + 3], "choices": [*words[3:7]]}
        for at in range(4)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture(scope="module")
def trained(ray_cluster, tasks, tmp_path_factory):
    """A training with checkpoints, and its spec."""
    folder = make_world(tmp_path_factory.mktemp("evaluated"), shards=1)
    content = small_training(folder, STEPS, evaluate={"tasks": [tasks], "checkpoints": True})
    content["train"] |= {"checkpoint_every": 10}
    spec = TrainSpec.model_validate(content)
    planned = plan_job(spec)
    return run_job(spec, Quiet()), spec, planned


def test_a_training_and_its_checkpoints_are_measured(trained, tasks):
    result, spec, planned = trained
    found = result["evaluate"]
    assert found["rows"] == {"next": 4} and found["chance"] == {"next": 0.25}
    [label] = found["models"]
    assert set(found["models"][label]["next"]) == {"acc", "acc_norm"} | {
        f"{name}_stderr" for name in ("acc", "acc_norm")
    }
    steps = sorted(map(int, found["checkpoints"][label]))
    assert steps and set(steps) <= {10, 20}
    assert result["work"]["evaluate"] == {"parts": 1 + len(steps), "reused": 0}
    assert planned["steps"]["evaluate"]["parts"] is None
    page = read(result["run"])
    for name in found["receipts"]:
        assert Path(spec.store, "evaluations", "receipts", f"{name}.json").exists()
    [table] = page.find("tasks", "table")
    assert [row[0] for row in table.rows] == [label, "a guess"]


def test_measured_again_for_another_task_alone(trained, tasks, tmp_path):
    result, spec, _ = trained
    assert run_job(spec, Quiet())["status"] == "nothing_to_do"
    text = tmp_path / "more.jsonl"
    text.write_text(json.dumps({"text": "the sea"}))
    content = spec.model_dump(mode="json", exclude_unset=True)
    content["evaluate"] = {"tasks": [tasks, str(text)]}
    again = run_job(TrainSpec.model_validate(content), Quiet())
    assert again["work"]["evaluate"] == {"parts": 2, "reused": 1}
    assert again["work"]["train"]["reused"] == 1
    [label] = again["evaluate"]["models"]
    assert again["evaluate"]["models"][label]["next"] == result["evaluate"]["models"][label]["next"]


def test_bits_per_byte_of_held_out_text(trained):
    result, spec, _ = trained
    store, found = Store(spec.store), result["train"]
    tokenizer = load_tokenizer(result["artifacts"]["tokenizer"], None)
    num_bytes = tokens = 0
    for path in Path(store.uri, "tokens", "parts").glob("*.parquet"):
        table = read_table(str(path))
        if set(read_pieces(table).sources) == {"sea"}:  # held out: the pool has four styles
            for row in token_ids(table):
                text = tokenizer.backend.decode(row[1:].tolist(), skip_special_tokens=True)
                num_bytes, tokens = num_bytes + len(text.encode()), tokens + len(row) - 1
    bits = found["heldout_nll"] * tokens / math.log(2) / num_bytes
    assert found["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    assert found["sources"]["sea"]["bits_per_byte"] == pytest.approx(bits, rel=1e-6)


def test_names_beside_files(tmp_path, tasks):
    """The spec of docs/evaluation.md: nothing is asked of the harness by a plan."""
    folder = make_world(tmp_path, shards=1)
    content = small_training(folder, STEPS, evaluate={"tasks": ["hellaswag", {"path": tasks}]})
    assert "evaluate" in plan_job(TrainSpec.model_validate(content))["steps"]


def test_what_it_costs_and_where_its_files_are():
    content = {"job": "train", "store": "s3://b/s", "data": {"path": "s3://b/pool"}}
    content |= {"evaluate": {"tasks": ["tasks/*.jsonl"]}, "compute": {"gpus_per_worker": 1}}
    spec = TrainSpec.model_validate(content)
    assert _gpus_of("evaluate", spec) == 1
    with pytest.raises(SpecError, match=r"evaluate.tasks.0.path: tasks/\*.jsonl"):
        refuse_local_paths(spec, "the cluster")


def test_an_unknown_task_is_refused_before_anything_is_trained(ray_cluster, tmp_path):
    folder = make_world(tmp_path, shards=1)
    spec = TrainSpec.model_validate(small_training(folder, STEPS, evaluate={"tasks": ["helaswag"]}))
    with pytest.raises(SpecError, match="did you mean hellaswag"):
        run_job(spec, Quiet())
    assert not (folder / "store" / "models").exists()


def test_the_models_of_a_selection_and_its_controls(finished, world, tasks, tmp_path):
    shutil.copytree(world / "store", tmp_path / "store")
    train = {"model": MODEL, "controls": ["random", "conditional_only", "dsir"], **LEARNING}
    spec = parse(world, train=train, evaluate={"tasks": [tasks]}, store=str(tmp_path / "store"))
    result = run_job(spec, Quiet())
    labels = [f"{name}, seed 0" for name in ("color", "random", "conditional_only", "dsir")]
    assert sorted(result["evaluate"]["models"]) == sorted(labels)
    assert result["work"]["evaluate"] == {"parts": 4, "reused": 0}
    assert result["work"]["train targets"]["reused"] == 4
    with pytest.raises(ValueError, match="measures the models of `train`"):
        parse(world, evaluate={"tasks": [tasks]})
    with pytest.raises(ValueError, match="is for `job: train`"):
        parse(world, train=train, evaluate={"tasks": [tasks], "checkpoints": True})
