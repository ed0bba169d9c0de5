"""Plans of chains: what steps of every job would cost that wait for others, before anything ran."""

from pathlib import Path

import pytest
import yaml
from mixing_world import write_data, write_spec
from small import CLASSIFY, TEACHER_NETWORK

from stillhouse.jobs.chain_plan import plan_spec
from stillhouse.jobs.spec_file import parse_spec


def planned(store, steps):
    chain = {"job": "chain", "store": str(store), "steps": steps, "compute": {"trainers": 1}}
    return plan_spec(parse_spec(chain, "chain"))["steps"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("mix"))


def test_a_mixture_into_another_steps_model(data, tmp_path):
    """As a mixture of a fresh model of the same sizes, without a tokenizer of its own."""
    mix = yaml.safe_load(Path(write_spec(data, "mix")).read_text())
    del mix["store"], mix["tokenizer"]
    base = {
        "job": "train",
        "data": {"path": str(data / "arms.parquet"), "columns": {"text": "input"}},
        "tokenizer": {"path": str(data / "tokenizer")},
        "model": {"hidden_size": 48, "num_layers": 2},
        "train": {"num_tokens": 4096},
    }
    sizes = {"hidden_size": 48, "num_layers": 2, "kind": "decoder"}
    trained = {"train": {"vocab_size": 8192}}
    waiting = mix | {"model": {"from": "base", "kind": "decoder"}, "tokenizer": {"from": "base"}}
    found = planned(tmp_path, {"base": base, "mix": waiting})
    rows = {name: row for name, row in found.items() if name.startswith("mix: ")}
    alone = planned(tmp_path, {"mix": mix | {"model": sizes, "tokenizer": trained}})
    assert "mix: tokenizer" in alone
    assert rows == {name: row for name, row in alone.items() if name != "mix: tokenizer"}
    assert {*rows} == {"mix: arms", "mix: mix"}


def test_a_student_of_another_steps_classifier(tmp_path):
    taught = {"objective": {"name": "kd", "teachers": [{"from": "teacher"}]}}
    student = CLASSIFY | {"train": CLASSIFY["train"] | taught}
    further = CLASSIFY | {"init": {"from": "teacher"}}
    del further["network"]
    found = planned(tmp_path, {"teacher": CLASSIFY, "student": student, "further": further})
    parts = [found[f"{name}: train"] for name in ("teacher", "student", "further")]
    assert parts[0] == parts[1] == parts[2]


def test_a_distillation_under_another_steps_classifier(tmp_path):
    """One that exists is not trained again; one of its own still is."""
    distill = {
        "job": "distill",
        "data": CLASSIFY["data"],
        "network": TEACHER_NETWORK,
        "method": {"name": "rded", "images_per_class": 2, "num_candidates": 5},
        "evaluate": {"seeds": 1, "epochs": 2},
    }
    for teachers, trained in (
        ([{"from": "teacher"}], False),
        ([{"from": "teacher"}, TEACHER_NETWORK], True),
    ):
        steps = {"teacher": CLASSIFY, "small": distill | {"teachers": teachers}}
        found = planned(tmp_path, steps)
        assert ("small: teachers" in found) == trained
        assert {"small: images", "small: distil", "small: evaluate"} <= {*found}
