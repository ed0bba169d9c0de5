"""Conversations from pool to model: scores, trainings and held-out losses count answers alone."""

import json
from pathlib import Path

import numpy as np
import pytest
from architectures import own_nll
from small import LEARNING, MODEL, Quiet, parse, rows
from transformers import AutoModelForCausalLM

from stillhouse import open_selection
from stillhouse.jobs.run import run_job
from stillhouse.storage.parquet import read_table
from stillhouse.training.spec import TrainSpec


def talks(seed, count, styles, prefix):
    """Questions about food, answers of ten words in the given styles, in turn."""
    asked = rows(seed, count, ["food"], prefix)
    said = rows(seed + 1, count, styles, prefix)
    return [
        {
            "id": f"{prefix}{i}",
            "source": answer["source"],
            "messages": [
                {"role": "user", "content": " ".join(question["text"].split()[:12])},
                {"role": "assistant", "content": " ".join(answer["text"].split()[:10])},
            ],
        }
        for i, (question, answer) in enumerate(zip(asked, said, strict=True))
    ]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("talks")
    for name, made in {
        "pool": talks(1, 400, ["sea", "code", "law", "code"], "p"),
        "target": talks(3, 120, ["sea"], "t"),
    }.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return folder


@pytest.fixture(scope="module")
def selected(ray_cluster, world):
    columns = {"messages": "messages"}
    spec = parse(
        world,
        pool={"path": str(world / "pool.jsonl"), "columns": columns},
        target={"path": str(world / "target.jsonl"), "columns": columns, "heldout": 0.2},
        selection={"tau": 4},
        prior={"model": MODEL, "num_tokens": 6000, "dtype": "float32", **LEARNING},
        conditional={"epochs": 2, "dtype": "float32", **LEARNING},
        scoring={"dtype": "float32"},
        train={"model": MODEL, "num_tokens": 4096, "controls": ["random"], **LEARNING},
    )
    return run_job(spec, Quiet())


def means(model, tokens, mask):
    counted = np.array(mask)[:, 1:].astype(bool)
    losses = own_nll(model, np.array(tokens))
    return np.array([row[kept].mean() for row, kept in zip(losses, counted, strict=True)])


def test_scores_are_differences_of_the_answers_losses(selected):
    selection = open_selection(selected["artifacts"]["selection"])
    found = {"prior": [], "conditional": []}
    score, tokens, mask = [], [], []
    for part in selection.parts:
        table = read_table(part.uri)
        score += table["score"].to_pylist()
        tokens += table["input_ids"].to_pylist()
        mask += table["loss_mask"].to_pylist()
        for name in found:
            found[name] += table[f"{name}_nll"].to_pylist()
    assert 0.2 < np.mean(mask) < 0.8
    for name, stored in found.items():
        model = AutoModelForCausalLM.from_pretrained(selected["artifacts"][name])
        np.testing.assert_allclose(stored, means(model, tokens, mask), atol=1e-4)
    difference = np.array(found["prior"]) - np.array(found["conditional"])
    np.testing.assert_allclose(score, difference, atol=1e-5)


def test_answers_of_the_target_are_kept(selected):
    """A quarter of the pool's answers are about the sea; all questions are alike."""
    share = open_selection(selected["artifacts"]["selection"]).sources
    tokens = {name: one["kept_tokens"] for name, one in share.items()}
    assert tokens["sea"] / sum(tokens.values()) > 0.6


def test_a_target_is_measured_on_answers(selected, world, reports):
    """`job: train` on the selection, with the target's file as held-out data."""
    spec = TrainSpec.model_validate(
        {
            "job": "train",
            "store": str(world / "store"),
            "data": {"from": selected["run"]},
            "heldout": {"path": str(world / "target.jsonl")},
            "model": MODEL,
            "train": {"num_tokens": 2048, "dtype": "float32", **LEARNING},
        }
    )
    result = run_job(spec, Quiet())
    store = Path(world / "store")
    model = AutoModelForCausalLM.from_pretrained(result["artifacts"]["model"])
    manifests = [json.loads(path.read_text()) for path in store.glob("tokens/*/manifest.json")]
    [held] = [
        one
        for one in manifests
        if one["inputs"]["units"][0]["files"][0]["uri"].endswith("target.jsonl")
        and not one["inputs"]["drops"]
    ]
    table = read_table(str(store / held["parts"][0]["path"]))
    ids, mask = (np.array(table[name].to_pylist()) for name in ("input_ids", "loss_mask"))
    losses = own_nll(model, ids)[mask[:, 1:] == 1]
    assert result["train"]["heldout_nll"] == pytest.approx(losses.mean(), abs=1e-4)
    code, found = reports("verify", selected["run"], "--sample", "8")
    assert (code, found["problems"]) == (0, [])
