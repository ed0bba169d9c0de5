"""What a wrong spec is told: one line a mistake, which names the place as the user wrote it."""

import pytest
import yaml

from stillhouse.errors import SpecError
from stillhouse.jobs.spec_file import load_spec

TRAIN = {"job": "train", "store": "./store"}
DATA = {"path": "a.parquet"}
MIX = {"job": "mix", "store": "./store", "target": {"path": "a.parquet"}}
SWEEP = {"metric": "train.heldout_nll", "search": "random", "max_runs": 3}


BASE = {"job": "train", "data": [DATA, {"paht": "b"}]}


def two(second):
    return TRAIN | {"data": [DATA, second]}


def over(values):
    return TRAIN | {"data": DATA, "sweep": SWEEP | {"over": {"train.learning_rate": values}}}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (two({"path": "b", "wieght": 2}), ["unknown key `data.1.wieght` (did you mean `weight`?)"]),
        (two({"from": "b", "max_epoch": 1}), ["unknown key `data.1.max_epoch` (did you mean"]),
        (two({"path": "b", "weight": -1}), ["`data.1.weight`: -1: input should be greater than 0"]),
        (two({"weight": 1}), ["`data.1.path` is missing"]),
        (two("b"), ["`data.1`: 'b': input should be a section"]),
        (two([{"path": "b"}]), ["`data.1`: [{'path': 'b'}]: input should be a section"]),
        (two({"path": ["b", 4]}), ["`data.1.path.1`: 4: input should be a valid string"]),
        (
            two({"path": "b", "weight": {"schedule": [{"at": 0.5, "weight": 1}]}}),
            ["`data.1.weight`: the first `at` is 0.5"],
        ),
        (
            TRAIN | {"data": [{"path": "a", "x": 1}, {"path": "b", "columns": {"text": 3}}]},
            ["unknown key `data.0.x`", "`data.1.columns.text`: 3: input should be a valid string"],
        ),
        (TRAIN | {"data": DATA | {"wieght": 2}}, ["unknown key `data.wieght`"]),
        (TRAIN | {"data": "a.parquet"}, ["`data`: 'a.parquet': input should be a section"]),
        (TRAIN | {"data": {"path": 3}}, ["`data.path`: 3: input should be a valid string"]),
        (MIX | {"auxiliary": [DATA, {"path": "b", "nam": "c"}]}, ["unknown key `auxiliary.1.nam`"]),
        (
            {"job": "chain", "store": "./store", "steps": {"base": BASE}},
            ["steps.base: `data.1.path` is missing", "steps.base: unknown key `data.1.paht`"],
        ),
        (over(0.1), ["`sweep.over.train.learning_rate`: 0.1: input should be a valid list"]),
        (over({"min": 1, "max": 1}), ["`sweep.over.train.learning_rate`: `min` has to be below"]),
        (
            over({"min": 1, "mx": 2}),
            [
                "`sweep.over.train.learning_rate.max` is missing",
                "unknown key `sweep.over.train.learning_rate.mx` (did you mean `max`?)",
            ],
        ),
    ],
)
def test_a_mistake_in_a_list_is_one_line(tmp_path, content, expected):
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(SpecError) as refused:
        load_spec(str(path), [])
    lines = str(refused.value).splitlines()
    assert len(lines) == len(expected), lines
    for line, beginning in zip(lines, expected, strict=True):
        assert line.startswith(f"{path}: {beginning}"), line
