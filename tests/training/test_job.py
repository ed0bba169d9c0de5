"""A training as a task: which sequences, what is kept, and that it is the same again."""

import numpy as np
import pytest
from architectures import own_nll
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load
from transformers import AutoModelForCausalLM

from stillhouse.actors.scorer import ScorerSettings
from stillhouse.fingerprint import sha256
from stillhouse.spec import ModelSettings, Optimisation, ScoringSettings
from stillhouse.storage.artifact import Store
from stillhouse.storage.filesystem import read_bytes
from stillhouse.storage.parquet import read_table
from stillhouse.text.documents import Document
from stillhouse.text.packing import Packer, tokens_table
from stillhouse.text.tokenizer import make_tokenizer, save_pretrained, train_tokenizer
from stillhouse.training.job import evaluation_steps, read_sequences, run_training
from stillhouse.training.task import (
    TRAINED_ON,
    DataPart,
    ModelTask,
    SameArchitecture,
    model_name,
)

LENGTH = 16
MODEL = ModelSettings(hidden_size=32, num_layers=1)
LEARNING = Optimisation(learning_rate=1e-2, global_batch=4)


def put_tokens(store, name, seed, rows=12):
    packer = Packer(sequence_length=LENGTH, eos_id=0, dtype=np.uint16, part_rows=1000)
    ids = np.random.default_rng(seed).integers(1, 250, rows * LENGTH - 1, dtype=np.uint32)
    packer.add(Document(0, 0, name, "a", ""), ids)
    return store.put_part(
        f"tokens/parts/{name}.parquet", tokens_table(packer.finish()), num_tokens=1
    )


@pytest.fixture
def task(tmp_path):
    """Makes tasks over two parts of twelve sequences; `task.store` holds them."""
    store = Store(str(tmp_path))
    words = make_tokenizer(train_tokenizer(["the ship sails"] * 3, vocab_size=260), None)
    save_pretrained(words, str(tmp_path / "words"), model_max_length=1000)
    parts = [put_tokens(store, "one", 1), put_tokens(store, "two", 2)]

    def make(rows=None, **changes):
        settings = {
            "fingerprint": "a" * 64,
            "label": "prior",
            "role": "prior",
            "init": MODEL,
            "data": tuple(DataPart(p.path, p.sha256, rows) for p in parts),
            "num_tokens": 8 * 4 * LENGTH,
            "settings": LEARNING,
            "seed": 0,
            "heldout": (),
            "eval_points": 0,
            "sequence_length": LENGTH,
            "vocab_size": words.vocab_size,
            "eos_token": words.eos_token,
            "tokenizer": str(tmp_path / "words"),
            "inputs": {},
            "device": "cpu",
            "gpus": 0,
        }
        return ModelTask(**(settings | changes))

    make.store, make.parts = store, parts
    return make


def test_makes_a_transformers_folder(task):
    steps = []
    manifest = run_training(task.store, task(), lambda step, total: steps.append((step, total)))
    assert steps == [(i + 1, 8) for i in range(8)]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(manifest.files)
    assert TRAINED_ON not in manifest.files  # it saw whole parts
    assert manifest.totals["num_tokens"] == 8 * 4 * LENGTH
    assert manifest.totals["num_steps"] == 8
    assert manifest.totals["curve"] == []
    again = run_training(task.store, task(fingerprint="b" * 64), lambda *_: None)
    assert again.files == manifest.files
    other = run_training(task.store, task(fingerprint="c" * 64, seed=1), lambda *_: None)
    assert other.files["model.safetensors"] != manifest.files["model.safetensors"]


def test_rows_are_kept_with_the_model(task):
    rows = np.array([1, 4, 9])
    run_training(task.store, task(rows=rows, num_tokens=6 * LENGTH), lambda *_: None)
    table = read_table(task.store.path("models", "a" * 64, TRAINED_ON))
    expected = [(p.sha256, row) for p in task.parts for row in (1, 4, 9)]
    assert list(zip(table["part"].to_pylist(), table["row"].to_pylist(), strict=True)) == expected


def test_goes_on_from_a_model_and_is_measured(task):
    first = run_training(task.store, task(), lambda *_: None)
    tuned = task(
        fingerprint="d" * 64,
        init=task.store.path("models", first.fingerprint),
        heldout=(task.parts[0].path,),
        eval_points=4,
    )
    curve = run_training(task.store, tuned, lambda *_: None).totals["curve"]
    assert [tokens for tokens, _ in curve] == [2 * 4 * LENGTH * i for i in (1, 2, 3, 4)]
    assert curve[-1][1] < curve[0][1] < np.log(320)


def test_read_sequences(task):
    whole = read_sequences(task.store, [DataPart(p.path) for p in task.parts])
    assert whole.shape == (24, LENGTH) and whole.dtype == np.uint16
    some = read_sequences(task.store, [DataPart(task.parts[1].path, rows=np.array([2, 5]))])
    assert some.tolist() == whole[[14, 17]].tolist()
    assert read_sequences(task.store, []).shape == (0, 0)


@given(st.integers(1, 200), st.integers(1, 20))
def test_evaluation_steps(num_steps, points):
    found = evaluation_steps(num_steps, points)
    assert max(found) == num_steps
    assert min(found) >= 1
    assert len(found) == min(points, num_steps) or len(found) <= points


def test_name_holds_what_decides_the_weights():
    base = model_name("prior", 1, 2, LEARNING, 0, 100)
    assert base == model_name("prior", 1, 2, LEARNING.model_copy(update={"seed": 5}), 0, 100)
    others = [
        model_name("target", 1, 2, LEARNING, 0, 100),
        model_name("prior", 2, 2, LEARNING, 0, 100),
        model_name("prior", 1, 3, LEARNING, 0, 100),
        model_name("prior", 1, 2, LEARNING.model_copy(update={"warmup": 0.3}), 0, 100),
        model_name("prior", 1, 2, LEARNING, 1, 100),
        model_name("prior", 1, 2, LEARNING, 0, 101),
    ]
    assert len({base, *others}) == 7
    assert len(base) == len(sha256(b""))


def test_a_fresh_model_of_the_architecture_of_another(task):
    """Configuration and shapes are the other's, the weights before the first step are not."""
    other = ModelSettings(architecture="gpt_neox", hidden_size=48, num_layers=1, num_heads=3)
    first = run_training(task.store, task(init=other), lambda *_: None)
    folder = task.store.path("models", "a" * 64)
    still = LEARNING.model_copy(update={"learning_rate": 1e-30})
    like = task(fingerprint="b" * 64, init=SameArchitecture(folder), settings=still, seed=3)
    made = run_training(task.store, like, lambda *_: None)
    assert made.files["config.json"] == first.files["config.json"]
    weights = [load(read_bytes(f"{folder}/model.safetensors"))]
    weights.append(load(read_bytes(task.store.path("models", "b" * 64, "model.safetensors"))))
    assert {n: w.shape for n, w in weights[0].items()} == {
        n: w.shape for n, w in weights[1].items()
    }
    name = next(name for name in weights[0] if name.endswith("query_key_value.weight"))
    assert weights[1][name].std() == pytest.approx(0.02, rel=0.1)  # transformers' initial spread
    assert not np.allclose(weights[0][name], weights[1][name])


def test_late_fall_is_kept(task):
    made = run_training(task.store, task(num_tokens=40 * 4 * LENGTH), lambda *_: None)
    assert made.totals["num_steps"] == 40 and made.totals["late_fall"] >= 0
    short = run_training(task.store, task(fingerprint="b" * 64), lambda *_: None)
    assert short.totals["late_fall"] is None  # 8 steps


def test_a_bos_token_stands_before_every_sequence(task):
    """In training, in what is measured on the way, and in scoring; the parts have none."""
    bos, part = 7, task.parts[0]
    held = {"heldout": (part.path,), "eval_points": 1}
    made = run_training(task.store, task(bos_id=bos, **held), lambda *_: None)
    folder = task.store.path("models", made.fingerprint)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = read_table(task.store.path(part.path))
    ids = np.array(tokens["input_ids"].to_pylist())
    expected = own_nll(model, ids, before=bos)
    assert model.config.max_position_embeddings == LENGTH + 1
    assert made.totals["curve"][-1][1] == pytest.approx(expected.mean(), abs=1e-5)
    settings = ScorerSettings(
        kind="causal_lm",
        path=folder,
        tokenizer="",
        eos_token="",
        scoring=ScoringSettings(),
        device="cpu",
        gpus=0,
        threads=1,
        bos_id=bos,
    )
    scores = settings.build(task.store).score(tokens)["value"].to_numpy()
    np.testing.assert_allclose(scores, expected.mean(1), atol=1e-5)
    plain = run_training(task.store, task(fingerprint="b" * 64, **held), lambda *_: None)
    assert plain.totals["final_loss"] != made.totals["final_loss"]
