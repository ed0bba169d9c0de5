"""`lora` in `job: train`: one worker and two sharded ones, adapters alone, bad specs."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError
from small import Quiet, rows, write

from stillhouse.errors import ModelError
from stillhouse.jobs.run import run_job
from stillhouse.training.spec import TrainSpec

LORA = {"rank": 4, "alpha": 8}


@pytest.fixture(scope="module")
def place(tmp_path_factory, untrained):
    folder = tmp_path_factory.mktemp("lora")
    write(folder / "pool" / "0.parquet", rows(1, 60, ["sea", "law"]))
    return folder, untrained


def parse(place, store, **changes):
    folder, untrained = place
    learning = {"num_tokens": 4096, "global_batch": 8, "learning_rate": 1e-2, "eval_points": 2}
    content = {
        "job": "train",
        "store": str(folder / store),
        "data": {"path": str(folder / "pool")},
        "init": untrained["prior"],
        "tokenizer": untrained["tokenizer"],
        "lora": LORA,
        "sequence_length": 32,
        "train": learning | {"dtype": "float32"} | changes.pop("train", {}),
        "compute": {"trainers": 1, "packers": 1},
    }
    return TrainSpec.model_validate(content | changes)


@pytest.fixture(scope="module")
def alone(ray_cluster, place):
    return run_job(parse(place, "one", lora=LORA | {"save": "adapter"}), Quiet())


def totals(result):
    return json.loads(Path(result["artifacts"]["model"], "manifest.json").read_text())["totals"]


def test_one_worker_and_two_sharded_ones(alone, place):
    changes = {"train": {"sharding": "fsdp"}, "compute": {"trainers": 2, "packers": 1}}
    made = [totals(alone), totals(run_job(parse(place, "two", **changes), Quiet()))]
    one, two = ([point["loss"] for point in found["points"]] for found in made)
    assert two == pytest.approx(one, rel=1e-5)
    assert one[-1] < one[0] - 0.1
    assert made[0]["num_trained"] == made[1]["num_trained"] < made[1]["num_parameters"] / 4


def test_adapters_alone_are_no_model_to_go_on_from(alone, place):
    files = {path.name for path in Path(alone["artifacts"]["model"]).iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= files
    further = parse(place, "one", init={"path": alone["artifacts"]["model"]}, lora=None)
    with pytest.raises(ModelError, match=r"holds adapters .* `lora.save: merged`, or merge them"):
        run_job(further, Quiet())


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"targets": ["q_proj", "queries"]}, r"`lora.targets`: queries: adapters go on .* q_proj,"),
        ({"targets": ["lm_head"]}, r"`lora.targets`: lm_head: "),
        ({"rank": 512}, r"`lora.rank: 512` is above the \d+ rows or columns"),
    ],
)
def test_layers_that_the_model_lacks_are_refused_before_tokens_are_made(
    ray_cluster, place, lora, message
):
    spec = parse(place, "wrong", lora=LORA | lora)
    with pytest.raises(ModelError, match=message):
        run_job(spec, Quiet())
    assert not (place[0] / "wrong" / "tokens").exists()
    assert not [*(place[0] / "wrong" / "checkpoints").glob("*")]


def test_also_where_the_model_is_known(alone, place):
    tokens = place[0] / "one" / "tokens"
    before = sorted(tokens.rglob("*"))
    spec = parse(place, "one", lora=LORA | {"targets": ["queries"]}, sequence_length=16)
    with pytest.raises(ModelError, match=r"`lora.targets`: queries"):
        run_job(spec, Quiet())
    assert sorted(tokens.rglob("*")) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": None}, "`lora` needs `init`"),
        ({"init": {"path": "m", "optimizer": "keep"}}, "adapters have no moments yet"),
        ({"lora": {"save": "adapter"}, "evaluate": {"tasks": ["t"]}}, "measure a `merged` model"),
        ({"lora": {"rank": 0}}, "lora.rank"),
        ({"lora": {"targets": []}}, "lora.targets"),
        ({"lora": {"save": "both"}}, "lora.save"),
        (
            {"train": {"objective": {"name": "autodistil", "teachers": [{"path": "m"}]}}},
            "trains slices of the model's own weights",
        ),
    ],
)
def test_refused(place, changes, message):
    with pytest.raises(ValidationError) as error:
        parse(place, "refused", **changes)
    assert message in str(error.value)
