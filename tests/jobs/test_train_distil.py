"""`train.objective: distil`: signals are what the teacher says, stored or live, for any workers."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from small import LEARNING, MODEL, Quiet, make_models, make_world
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from stillhouse.errors import InputError, ModelError, SpecError
from stillhouse.jobs.plan import plan_job
from stillhouse.jobs.run import run_job
from stillhouse.training.spec import TrainSpec

LENGTH, STEPS, TOP_K = 32, 12, 5


def spec(folder, **changes):
    content = {
        "job": "train",
        "store": str(folder / "store"),
        "data": {"path": str(folder / "pool" / "*.parquet")},
        "heldout": {"path": str(folder / "target" / "*.parquet")},
        "sequence_length": LENGTH,
        "part_tokens": 4096,
        "model": {"hidden_size": 16, "num_layers": 1},
    }
    return TrainSpec.model_validate(content | changes)


def train(folder, **changes):
    return run_job(spec(folder, **changes), Quiet())


def learning(teacher, **changes):
    objective = {"name": "distil", "teachers": [{"from": teacher["run"]}], "top_k": TOP_K}
    return {
        "num_tokens": LENGTH * 8 * STEPS,
        "dtype": "float32",
        "eval_points": STEPS,
        **LEARNING,
        "objective": objective | changes,
    }


def losses(result):
    manifest = json.loads(Path(result["artifacts"]["model"], "manifest.json").read_text())
    return [point["loss"] for point in manifest["totals"]["points"]]


@pytest.fixture(scope="module")
def world(ray_cluster, tmp_path_factory):
    """A pool of two shards, and a model trained on it."""
    folder = make_world(tmp_path_factory.mktemp("distil"), shards=2, per_shard=60)
    more = {"num_tokens": LENGTH * 8 * 60, "dtype": "float32", **LEARNING}
    tokenizer = {"train": {"vocab_size": 300}}
    return folder, train(folder, tokenizer=tokenizer, model=MODEL, train=more)


@pytest.fixture(scope="module")
def stored(world):
    folder, teacher = world
    return train(
        folder, tokenizer={"from": teacher["run"]}, train=learning(teacher), compute={"scorers": 2}
    )


def test_signals_are_the_teachers_likeliest_tokens(world, stored):
    """Of every token part, against all logits of the model as transformers loads it."""
    folder, teacher = world
    model = AutoModelForCausalLM.from_pretrained(teacher["artifacts"]["model"]).eval()
    num_tokens = Tokenizer.from_file(f"{teacher['artifacts']['tokenizer']}/tokenizer.json")
    num_tokens = num_tokens.get_vocab_size()
    store = folder / "store"
    parts = {path: pq.read_table(path) for path in (store / "signals" / "parts").iterdir()}
    tokens = [pq.read_table(path) for path in (store / "tokens" / "parts").iterdir()]
    tokens = [table for table in tokens if "input_ids" in table.column_names]
    assert len(parts) > 2
    matched = 0
    for signals in parts.values():
        for table in tokens:
            if table.num_rows != signals.num_rows:
                continue
            ids = np.stack(table["input_ids"].to_numpy()).astype(np.int64)
            with torch.no_grad():
                logits = model(input_ids=torch.from_numpy(ids)).logits[:, :-1]
            p = logits[..., :num_tokens].double().log_softmax(-1)
            values, best = p.topk(TOP_K)
            found = torch.tensor(np.stack(signals["ids"].to_numpy())).view(best.shape)
            if not torch.equal(found.long(), best):
                continue
            matched += 1
            kept = np.stack(signals["log_probs"].to_numpy()).astype(np.float64)
            np.testing.assert_allclose(kept.reshape(values.shape), values, atol=4e-3)
            rest = np.log1p(-values.exp().sum(-1).numpy())
            tails = np.stack(signals["tails"].to_numpy())
            np.testing.assert_allclose(tails.reshape(rest.shape), rest, atol=1e-3)
    assert matched == len(parts)


def test_plan_says_how_large_signals_will_be(tmp_path):
    """Before anything is spent, and without Ray."""
    folder, models = make_world(tmp_path, shards=2, per_shard=20), make_models(tmp_path / "models")
    objective = {"name": "distil", "teachers": [models["prior"]], "top_k": 7}
    objective |= {"temperatures": [1.0, 2.0]}
    planned = plan_job(spec(folder, tokenizer=models["tokenizer"], train={"objective": objective}))
    step = planned["steps"]["teacher signals"]
    assert step["bytes"] == pytest.approx(step["tokens"] * (7 * 6 + 2 * 4), rel=1e-3)


def test_live_signals_give_the_losses_of_stored_ones(world, stored):
    folder, teacher = world
    live = train(
        folder,
        tokenizer={"from": teacher["run"]},
        train=learning(teacher, signals="live"),
    )
    assert losses(live) == pytest.approx(losses(stored), abs=1e-4)


@pytest.mark.soak
def test_two_workers_learn_what_one_does(world, stored):
    folder, teacher = world
    again = train(
        folder,
        store=str(folder / "other"),
        tokenizer={"path": teacher["artifacts"]["tokenizer"]},
        train=learning(teacher, teachers=[{"path": teacher["artifacts"]["model"]}]),
        compute={"trainers": 2},
    )
    assert again["train"]["order_sha256"] == stored["train"]["order_sha256"]
    assert losses(again) == pytest.approx(losses(stored), rel=1e-5)


def test_the_teacher_is_learnt_from(world, stored):
    """Imitation alone comes nearer to the teacher than the text does, in as many steps."""
    folder, teacher = world
    model = AutoModelForCausalLM.from_pretrained(teacher["artifacts"]["model"]).eval()
    pool = next(
        table
        for path in sorted((folder / "store" / "tokens" / "parts").iterdir())
        if "input_ids" in (table := pq.read_table(path)).column_names
    )
    ids = torch.from_numpy(np.stack(pool["input_ids"].to_numpy()).astype(np.int64))[:64]

    def divergence(weight):
        made = train(
            folder,
            tokenizer={"from": teacher["run"]},
            train=learning(teacher, weight=weight, top_k=64),
        )
        student = AutoModelForCausalLM.from_pretrained(made["artifacts"]["model"]).eval()
        with torch.no_grad():
            p, q = (m(input_ids=ids).logits.log_softmax(-1) for m in (model, student))
        return float((p.exp() * (p - q)).sum(-1).mean())

    assert divergence(1.0) < divergence(0.0)


def test_what_is_refused(world, tmp_path):
    folder, teacher = world
    given = {"tokenizer": {"from": teacher["run"]}}
    for objective, wanted in (
        ({"temperature": 2.0}, "not one of `objective.temperatures`"),
        ({"teachers": []}, "needs at least one"),
        ({"sampling": "importance", "direction": "reverse"}, "needs `sampling: top`"),
        ({"name": "cross_entropy"}, "cross_entropy has none"),
    ):
        with pytest.raises(ValueError, match=wanted):
            train(folder, **given, train=learning(teacher, **objective))
    for objective, wanted in (
        ({"weight": 1.5}, "is not between 0 and 1"),
        ({"top_k": 4000}, "the tokenizer has only"),
        ({"wieght": 0.5}, "unexpected keyword argument 'wieght'"),
    ):
        with pytest.raises(SpecError, match=wanted):
            train(folder, **given, train=learning(teacher, **objective))
    models = make_models(tmp_path)
    other = models["prior"]["path"]
    shutil.copy(f"{models['tokenizer']['path']}/tokenizer.json", other)
    with pytest.raises(ModelError, match=r"is not the one beside train\.objective\.teachers\.0"):
        train(folder, **given, train=learning(teacher, teachers=[{"path": other}]))


def test_a_teacher_that_gives_nan_is_named_before_the_training(world, tmp_path):
    folder, teacher = world
    broken = tmp_path / "broken"
    shutil.copytree(teacher["artifacts"]["model"], broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    shutil.copytree(teacher["artifacts"]["tokenizer"], broken, dirs_exist_ok=True)
    teachers = [{"from": teacher["run"]}, {"path": str(broken)}]
    with pytest.raises(InputError, match=r"`train\.objective\.teachers\.1`: .* gives NaN"):
        train(
            folder,
            tokenizer={"from": teacher["run"]},
            train=learning(teacher, teachers=teachers),
        )
