"""`from:` names what another run made; a training starts from its model, a prior is one."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file
from small import LEARNING, MODEL, Quiet, make_models, make_world, parse
from transformers import T5Config

import stillhouse
from stillhouse.errors import ArtifactError, ModelError, SpecError
from stillhouse.jobs.run import list_job, run_job
from stillhouse.jobs.verify import verify
from stillhouse.pipelines.given import weights_digest
from stillhouse.storage.artifact import Store
from stillhouse.training.spec import TrainSpec


def train(folder, shown=None, **changes):
    content = {
        "job": "train",
        "store": str(folder / "store"),
        "data": {"path": str(folder / "pool" / "pool-00.parquet")},
        "sequence_length": 32,
        "train": {"num_tokens": 32 * 8 * 10, "dtype": "float32", **LEARNING},
    }
    return run_job(TrainSpec.model_validate(content | changes), shown or Quiet())


def manifest(result, name="model"):
    return json.loads(Path(result["artifacts"][name], "manifest.json").read_text())


@pytest.fixture(scope="module")
def chain(ray_cluster, tmp_path_factory):
    """A tokenizer and a model of the pool's first shard, and a selection with it as the prior."""
    folder = make_world(tmp_path_factory.mktemp("chain"), shards=3, per_shard=60)
    tokenizer = {"train": {"vocab_size": 300}}
    first = train(folder, tokenizer=tokenizer, model=MODEL)
    run = Path(first["run"]).name
    spec = parse(
        folder,
        prior={"from": run[:12]},
        tokenizer={"from": first["run"]},
        selection={"tau": 8, "exclude_prior_rows": True},
        publish="kept",
    )
    return folder, first, run_job(spec, Quiet())


def test_a_tokenizer_is_trained_on_the_documents_to_train_on(chain):
    folder, first, _ = chain
    made = manifest(first, "tokenizer")
    assert made["totals"]["role"] == "tokenizer" and made["totals"]["vocab_size"] <= 300
    assert manifest(first)["settings"]["tokenizer"]["sha256"] == made["totals"]["digest"]
    assert train(folder, tokenizer={"train": {"vocab_size": 300}}, model=MODEL)["status"] == (
        "nothing_to_do"
    )


def test_rows_of_documents_that_a_prior_of_another_run_saw_are_left_out(chain):
    """By file and row, found here from the raw ids alone; `verify` finds the same."""
    folder, first, selected = chain
    model = first["artifacts"]["model"]
    assert selected["artifacts"]["prior"] == model
    table = pq.read_table(f"{model}/documents.parquet").to_pylist()
    raw = pq.read_table(folder / "pool" / "pool-00.parquet")
    seen = {raw["id"][row].as_py() for one in table for row in range(one["first"], one["last"])}
    store = Store(str(folder / "store"))
    pool = store.get_manifest("tokens", Path(selected["artifacts"]["tokens"]).name)
    hidden = 0
    for part in pool.parts:
        for pieces in pq.read_table(store.path(part.path))["documents"].to_pylist():
            hidden += any(piece["id"] in seen for piece in pieces)
    assert hidden > 20
    assert selected["selection"]["fates"]["prior row"] == hidden
    kept = stillhouse.open_selection(selected["run"]).to_arrow().read_all()["documents"]
    assert not any(piece["id"] in seen for pieces in kept.to_pylist() for piece in pieces)
    assert verify(selected["run"], 4)["problems"] == []


def test_a_training_goes_on_from_a_model_with_its_moments(chain):
    folder, first, _ = chain
    init, still = {"from": first["run"]}, {"learning_rate": 1e-30, "global_batch": 8}
    settings = {}
    for name in ("fresh", "keep"):
        found = train(folder, init=init | {"optimizer": name}, train={"num_tokens": 512, **still})
        settings[name] = manifest(found)["settings"]
        one, other = (
            load_file(f"{made['artifacts']['model']}/model.safetensors") for made in (first, found)
        )
        assert all(np.allclose(one[key], other[key], atol=1e-6) for key in one)
        used = {manifest(made, "tokenizer")["totals"]["digest"] for made in (first, found)}
        assert len(used) == 1
    digest = weights_digest(manifest(first)["files"])
    assert settings["fresh"]["model"] == {"weights": digest}
    assert set(settings["keep"]["model"]) == {"weights", "moments"}


def test_a_model_is_trained_on_what_a_run_selected(chain):
    """By the run, by its published name, and by the old key."""
    folder, first, selected = chain
    store = str(folder / "store")
    names = [{"from": selected["run"]}, {"from": f"{store}#kept"}, {"selection": selected["run"]}]
    found = [train(folder, data=data, init={"from": first["run"]}) for data in names]
    assert len({one["model_fingerprint"] for one in found}) == 1
    assert found[0]["train"]["num_steps"] == 10


def test_what_is_refused(chain, tmp_path):
    folder, first, selected = chain
    store, models = Store(str(folder / "store")), make_models(tmp_path)
    shutil.copytree(models["prior"]["path"], tmp_path / "t5")
    config = T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, vocab_size=320)
    config.save_pretrained(tmp_path / "t5")

    def refused(error, match, **changes):
        content = {
            "job": "train",
            "store": store.uri,
            "data": {"path": str(folder / "pool" / "pool-00.parquet")},
        }
        with pytest.raises(error, match=match):
            list_job(TrainSpec.model_validate(content | changes)).open(store, remember=False)

    given = models["prior"]
    refused(ValueError, "either `model` or `init`", init=given, model=MODEL)
    refused(ValueError, "either `path` or `from`", init=given | {"from": "x"})
    refused(ValueError, "knows only the tokens", init=given, tokenizer={"train": {}})
    refused(ModelError, r"init .*t5' is an encoder-decoder \(t5\)", init={"path": f"{tmp_path}/t5"})
    keep = {"init": given | {"optimizer": "keep"}, "tokenizer": models["tokenizer"]}
    refused(ModelError, "has no checkpoints in", **keep)
    refused(ArtifactError, "no run and no artifact of", init={"from": "0123456789ab"})
    refused(ArtifactError, "it made no selection", data={"from": first["run"]})
    refused(ArtifactError, "it made no model", init={"from": selected["run"]})
    packed = {"data": {"from": selected["run"]}, "tokenizer": {"train": {}}}
    refused(SpecError, "`data` is tokens already", **packed)
    again = {"init": {"from": first["run"]}, "tokenizer": models["tokenizer"]}
    refused(ModelError, "is not the one beside init", **again)


def test_rows_of_prompt_and_answer_are_trained_on_by_their_answers(chain, tmp_path):
    """One pass: as many tokens count as answers and their ends have, by the stored parts."""
    folder, first, _ = chain
    rows = [{"prompt": f"the ship {i} ", "completion": "sails the sea"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = train(
        folder,
        data={"path": str(tmp_path / "rows.jsonl")},
        init={"from": first["run"]},
        train={"learning_rate": 1e-3, "global_batch": 1, "eval_points": 1},
    )
    made = manifest(found)
    store = Store(str(folder / "store"))
    names = [entry.name for entry in (folder / "store" / "tokens").iterdir()]
    tokens = [store.find_manifest("tokens", name) for name in names if len(name) == 64]
    [pairs] = [t for t in tokens if t and "prompt" in t.settings["reading"]["columns"]]
    table = pq.read_table(store.path(pairs.parts[0].path))
    masks = np.array(table["loss_mask"].to_pylist())
    assert 0.2 < masks.mean() < 0.8 and made["totals"]["num_steps"] == len(masks)
    [trained] = made["totals"]["evaluations"][-1]["trained"].values()
    assert trained["num_tokens"] == masks[:, 1:].sum()
