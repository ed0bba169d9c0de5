"""`learning_rate: auto` and `global_batch: auto` in whole jobs, and models beside a given prior."""

import json
from pathlib import Path

import pytest
from small import MODEL, Quiet, parse

from stillhouse.jobs.run import run_job
from stillhouse.report.page import read
from stillhouse.training.spec import TrainSpec

WIDE = {"hidden_size": 128, "num_layers": 1}
AUTO = {
    "prior": {"model": MODEL, "num_tokens": 6000},
    "conditional": {"epochs": 1},
    "train": {"model": WIDE},
}
"""Widths of 32 and 128 on a few thousand tokens: the rule's largest rate, and 0.5 / 128."""


class Messages(Quiet):
    """Keeps what is said of recipes."""

    def __init__(self):
        super().__init__()
        self.recipes = []

    def note(self, kind, content):
        if kind == "recipe":
            self.recipes.append(content["message"])


@pytest.fixture(scope="module")
def auto(ray_cluster, world, tmp_path_factory):
    """A job without rates and batches: its result, its messages, and its store."""
    store, messages = tmp_path_factory.mktemp("auto"), Messages()
    return run_job(parse(world, store=str(store), **AUTO), messages), messages, store


def numbers(result, name):
    found = result["training"][name]
    return found["learning_rate"], found["global_batch"]


def test_the_chosen_numbers_are_shown_and_name_the_models(auto, world):
    """The same numbers written out give the same models: nothing is trained again."""
    result, messages, store = auto
    assert parse(world, prior={}).prior.learning_rate == "auto"
    assert numbers(result, "prior") == numbers(result, "conditional") == (4e-3, 8)
    assert numbers(result, "color, seed 0") == (2e-3, 8)
    assert messages.recipes == [
        "train prior: learning rate 0.004, 8 sequences a step",
        "train conditional: learning rate 0.004, 8 sequences a step",
        "train targets: learning rate 0.002, 8 sequences a step",
    ]
    (table,) = read(result["run"]).find("training", "table")
    assert [*table.columns][2:5] == ["steps", "global batch", "learning rate"]
    steps = round(result["training"]["prior"]["num_tokens"] / 256)
    assert next(row for row in table.rows if row[0] == "prior")[2:5] == [steps, 8, 4e-3]

    explicit = {
        name: AUTO[name] | {"learning_rate": rate, "global_batch": 8}
        for name, rate in (("prior", 4e-3), ("conditional", 4e-3), ("train", 2e-3))
    }
    again = run_job(parse(world, store=str(store), **explicit), Quiet())
    assert again["run"] != result["run"]
    assert again["artifacts"]["targets"] == result["artifacts"]["targets"]
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
    spec = parse(world, store=str(tmp_path), conditional={}, train=train, **given)
    result = run_job(spec, Quiet())
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
        "model": WIDE,
    }
    messages = Messages()
    result = run_job(TrainSpec.model_validate(spec), messages)
    chosen = {"learning_rate": 2e-3, "global_batch": 8}
    assert result["train"].items() >= chosen.items()
    assert messages.recipes == ["train: learning rate 0.002, 8 sequences a step"]
    manifest = json.loads(Path(result["artifacts"]["model"], "manifest.json").read_text())
    assert manifest["settings"]["train"].items() >= chosen.items()
