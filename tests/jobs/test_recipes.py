"""`learning_rate: auto` and `global_batch: auto` in whole jobs, and models beside a given prior."""

import json
from pathlib import Path

import pytest
from small import MODEL, Quiet, parse, small_spec

from stillhouse.jobs.run import run_job
from stillhouse.report.page import read
from stillhouse.training.spec import TrainSpec

AUTO = {
    "prior": {"model": MODEL, "num_tokens": 6000},
    "conditional": {"epochs": 1},
    "train": {"model": {"hidden_size": 128, "num_layers": 1}},
}
"""Widths of 32 and 128 on a few thousand tokens: the rule's largest rate, and 0.5 / 128."""


class Told(Quiet):
    def __init__(self):
        super().__init__()
        self.notes = []

    def note(self, kind, content):
        self.notes.append((kind, content))


@pytest.fixture(scope="module")
def auto(ray_cluster, world, tmp_path_factory):
    """A job with nothing said of rates and batches: its result, what it told, and its store."""
    store, told = tmp_path_factory.mktemp("auto"), Told()
    return run_job(parse(world, store=str(store), **AUTO), told), told, store


def numbers(result, name):
    found = result["training"][name]
    return found["learning_rate"], found["global_batch"]


def test_what_is_chosen_is_said(auto):
    result, told, _ = auto
    assert numbers(result, "prior") == (4e-3, 8)
    assert numbers(result, "conditional") == (4e-3, 8)
    assert numbers(result, "color, seed 0") == (2e-3, 8)
    assert [content["message"] for kind, content in told.notes if kind == "recipe"] == [
        "train prior: learning rate 0.004, 8 sequences a step",
        "train conditional: learning rate 0.004, 8 sequences a step",
        "train targets: learning rate 0.002, 8 sequences a step",
    ]
    (table,) = read(result["run"]).find("training", "table")
    assert [*table.columns][2:5] == ["steps", "global batch", "learning rate"]
    steps = round(result["training"]["prior"]["num_tokens"] / 256)
    assert next(row for row in table.rows if row[0] == "prior")[2:5] == [steps, 8, 4e-3]


def test_the_numbers_are_what_models_are_named_by(auto, world):
    """The same numbers written out are the same models: nothing is trained again."""
    first, _, store = auto
    explicit = {
        "prior": AUTO["prior"] | {"learning_rate": 4e-3, "global_batch": 8},
        "conditional": AUTO["conditional"] | {"learning_rate": 4e-3, "global_batch": 8},
        "train": AUTO["train"] | {"learning_rate": 2e-3, "global_batch": 8},
    }
    again = run_job(parse(world, store=str(store), **explicit), Quiet())
    assert again["run"] != first["run"]
    assert again["artifacts"]["targets"] == first["artifacts"]["targets"]
    trained = [name for name in again["work"] if name.startswith("train ")]
    assert trained == ["train prior", "train conditional", "train targets"]
    assert all(again["work"][name]["reused"] == again["work"][name]["parts"] for name in trained)
    pins = [path for path in Path(store, "pins").rglob("*") if path.is_file()]
    assert "auto" not in "".join(path.read_text() for path in pins)


@pytest.mark.soak
def test_a_given_prior_is_tuned_gently_and_its_architecture_is_rho_downs(
    ray_cluster, world, untrained, tmp_path
):
    given = {name: untrained[name] for name in ("tokenizer", "prior")}
    train = {"model": MODEL, "controls": ["rho_down"]}
    result = run_job(
        parse(world, store=str(tmp_path), conditional={}, train=train, **given), Quiet()
    )
    assert numbers(result, "conditional") == (4e-4, 8)  # a tenth
    assert numbers(result, "down") == (4e-3, 8)  # from scratch
    [down] = [
        path.parent
        for path in Path(tmp_path, "models").glob("*/manifest.json")
        if json.loads(path.read_text())["totals"].get("role") == "down"
    ]
    shapes = [
        json.loads(Path(folder, "config.json").read_text())
        for folder in (down, untrained["prior"]["path"])
    ]
    assert shapes[0] == shapes[1]
    assert shapes[0]["hidden_size"] == MODEL["hidden_size"] != 128


def test_a_train_job(auto, tmp_path):
    spec = {
        "job": "train",
        "store": str(tmp_path),
        "data": {"selection": auto[0]["artifacts"]["selection"]},
        "model": {"hidden_size": 128, "num_layers": 1},
        "compute": {"trainers": 2},
    }
    told = Told()
    result = run_job(TrainSpec.model_validate(spec), told)
    assert result["train"]["learning_rate"] == 2e-3
    assert result["train"]["global_batch"] == 8
    said = [content["message"] for kind, content in told.notes if kind == "recipe"]
    assert said == ["train: learning rate 0.002, 8 sequences a step"]
    manifest = json.loads(Path(result["artifacts"]["model"], "manifest.json").read_text())
    assert (manifest["settings"]["train"]["learning_rate"]) == 2e-3
    assert "auto" not in (
        manifest["settings"]["train"]["learning_rate"],
        manifest["settings"]["train"]["global_batch"],
    )


def test_defaults_say_auto(world):
    spec = small_spec(world)
    assert parse(world, prior={}).prior.learning_rate == "auto"
    assert parse(world).prior.learning_rate == spec["prior"]["learning_rate"]
