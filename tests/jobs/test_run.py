"""The whole select job: in this process, from Python with events, and from the command line."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import yaml
from result_keys import check_keys
from small import LEARNING, MODEL, Quiet, digests, own_packages, parse, small_spec, write_spec

import stillhouse
from stillhouse import open_artifact, open_selection
from stillhouse.fingerprint import sha256
from stillhouse.jobs.run import JobRun, run_job
from stillhouse.report.page import read
from stillhouse.storage import digests as digests_module
from stillhouse.storage.filesystem import read_bytes
from stillhouse.storage.parquet import read_table
from stillhouse.storage.sealed import unseal

KINDS = ("tokens", "scores", "selections", "models")
STILLHOUSE = str(Path(sys.executable).with_name("stillhouse"))
TRAIN = {"model": MODEL, "controls": ["random", "conditional_only", "dsir"], **LEARNING}


def test_the_result(finished):
    assert (finished["status"], finished["job"]) == ("done", "select")
    check_keys(finished)
    assert {"prior", "conditional"} <= set(finished["artifacts"]["scores"])
    assert set(finished["target"]) == {"color", "random", "conditional_only", "dsir"}
    assert finished["work"]["tokens"]["reused"] == 0
    assert Path(finished["report"]).read_text().startswith("<!doctype html>")
    json.dumps(finished, allow_nan=False)
    seconds = finished["cost"]["device_seconds"]
    assert [n for n, s in seconds.items() if n.startswith(("train", "score")) and not s > 0] == []
    sources = finished["selection"]["sources"]
    assert set(sources) == {"sea", "code", "law", "food"}
    assert sources["sea"]["kept_tokens"] > 0.8 * finished["selection"]["num_tokens"]
    losses = {name: row["heldout_nll"] for name, row in finished["target"].items()}
    assert losses["color"] < losses["random"] - 0.3


def test_counts_agree(finished):
    pool = open_artifact(finished["artifacts"]["tokens"])
    kept = finished["selection"]
    assert kept["num_sequences"] == int(pool.num_rows / 8)
    assert kept["num_tokens"] == kept["num_sequences"] * 32
    assert sum(kept["fates"].values()) == pool.num_rows
    assert kept["fates"]["kept"] == kept["num_sequences"]
    assert sum(s["pool_tokens"] for s in kept["sources"].values()) == pool.num_tokens
    assert sum(s["kept_tokens"] for s in kept["sources"].values()) == kept["num_tokens"]
    heldout = open_artifact(finished["artifacts"]["heldout_tokens"]).parts
    parts = len(pool.parts) + len(heldout)
    assert finished["work"]["scores"] == {"parts": 2 * parts, "reused": 0}
    assert {n: len(p) for n, p in finished["artifacts"]["heldout_scores"].items()} == {
        "prior": len(heldout),
        "conditional": len(heldout),
    }
    assert len({row["num_tokens"] for row in finished["target"].values()}) == 1


def test_what_was_deleted_by_hand_is_made_again(finished, world, tmp_path):
    """A part of tokens, scores and selection, and a model: the same bytes as before."""
    store = tmp_path / "store"
    shutil.copytree(world / "store", store)
    before = digests(store, *KINDS)
    selected = open_artifact(finished["artifacts"]["selection"]).parts[0]
    scores = open_artifact(finished["artifacts"]["scores"]["prior"]).parts
    lost = [
        next((store / "tokens" / "parts").glob("*.parquet")),
        store / Path(scores[0].uri).relative_to(world / "store"),
        store / Path(selected.uri).relative_to(world / "store"),
        store / "models" / Path(finished["artifacts"]["conditional"]).name / "model.safetensors",
    ]
    for path in lost:
        path.unlink()
    again = run_job(parse(world, store=str(store), train=TRAIN), Quiet())
    assert again["status"] == "done"
    assert digests(store, *KINDS) == before
    made = {name: w["parts"] - w["reused"] for name, w in again["work"].items()}
    steps = ("tokens", "scores", "selection", "train conditional")
    assert {step: made[step] for step in steps} == dict.fromkeys(steps, 1)
    assert made["train prior"] == made["train targets"] == 0


def test_a_selection_opens_without_ray_and_in_other_libraries(finished, world):
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer

    count = finished["selection"]["num_sequences"]
    for uri in (finished["run"], finished["artifacts"]["selection"]):
        selection = open_selection(uri)
        table = selection.to_arrow().read_all()
        assert table.num_rows == selection.num_rows == count
        assert {"input_ids", "documents", "part", "row"} <= set(table.column_names)
        score = table["score"].to_numpy()
        losses = table["prior_nll"].to_numpy() - table["conditional_nll"].to_numpy()
        np.testing.assert_array_equal(score, losses)
        assert score.min() == np.float32(selection.threshold)
    found = selection.provenance(3)
    assert Path(found["documents"][0]["file"]).parent == world / "pool"
    assert found["documents"][0]["id"].startswith("s")
    pool = open_artifact(finished["artifacts"]["tokens"])
    assert found["token_part"] == pool.manifest.parts[found["part"]].path
    pattern = finished["artifacts"]["selection"] + "/part-*.parquet"
    assert datasets.load_dataset("parquet", data_files=pattern, split="train").num_rows == count
    for folder in (finished["artifacts"]["prior"], finished["artifacts"]["targets"]["color"][0]):
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        batch = tokenizer("the ship wind wave sail", return_tensors="pt")
        assert model(input_ids=batch["input_ids"]).logits.isfinite().all()
        assert tokenizer.decode(batch["input_ids"][0]) == "the ship wind wave sail"


def test_again_there_is_nothing_to_do(finished, world):
    """In a process of its own, as cron starts it: neither Ray nor torch is imported."""
    spec = write_spec(world, train=TRAIN)
    code = (
        "import sys; from stillhouse.jobs.cli import app\n"
        "try: app(['run', sys.argv[1], '--json'])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "print(sorted({'ray', 'torch'} & set(sys.modules)), file=sys.stderr)"
    )
    before = digests(world / "store")
    done = subprocess.run(
        [sys.executable, "-c", code, spec], capture_output=True, text=True, timeout=120
    )
    assert done.stderr == "[]\n"
    result = json.loads(done.stdout)
    assert result["status"] == "nothing_to_do"
    assert result["artifacts"] == finished["artifacts"]
    assert all(step["parts"] == step["reused"] for step in result["work"].values())
    assert digests(world / "store") == before


def test_the_command_line_makes_the_same_bytes(finished, world, tmp_path):
    """Another process, another store, one scorer, everything trained again: only the manifests of
    models differ, which tell how long a training took.

    It runs where the user has packages of our folders' names, which no process may import.
    """
    spec, own = write_spec(world), own_packages(tmp_path / "project")
    sets = ["--set", f"store={tmp_path / 'store'}", "--set", "compute.scorers=1"]
    done = subprocess.run(
        [STILLHOUSE, "run", spec, "--json", *sets],
        cwd=own,
        env=os.environ | {"PYTHONPATH": str(own)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["status"] == "done"
    mine = digests(tmp_path / "store", "tokens/parts", "scores/parts", "selections", "models")
    theirs = digests(world / "store")
    different = [path for path, digest in mine.items() if theirs.get(path) != digest]
    assert [path for path in different if not Path(path).match("models/*/manifest.json")] == []
    name = open_selection(result["run"]).manifest.fingerprint
    assert name == finished["selection_fingerprint"]
    assert [line for line in done.stderr.splitlines() if "WARNING" in line or "INFO" in line] == []


def test_from_python_with_events(ray_cluster, world, untrained, tmp_path):
    spec = small_spec(world, store=str(tmp_path / "store"), **untrained)
    events = []
    result = stillhouse.run(spec, on_event=events.append)
    assert result["status"] == "done"
    done = defaultdict(float)
    for event in events:
        if event["kind"] == "progress":
            done[event["step"]] += event["done"]
    steps = {event["step"]: event for event in events if event["kind"] == "step"}
    ended = {event["step"] for event in events if event["kind"] == "step done"}
    assert set(steps) == ended and {"scan", "tokens", "score prior", "selection"} <= ended
    assert {s: steps[s]["reused"] + done[s] for s in done} == pytest.approx(
        {s: steps[s]["parts"] for s in done}
    )
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(spec))
    assert stillhouse.run(path)["status"] == "nothing_to_do"
    assert stillhouse.plan(spec)["status"] == stillhouse.plan(path)["status"] == "nothing_to_do"
    for call in (stillhouse.run, stillhouse.plan):
        with pytest.raises(stillhouse.StillhouseError, match=r"`job: selekt` is not known"):
            call({"job": "selekt"})
        with pytest.raises(stillhouse.StillhouseError, match=r"no such file"):
            call(tmp_path / "none.yaml")


def test_the_report_compares_over_all_scores(finished, world):
    """Spread and means against numpy over every stored score, pool and held-out text."""
    artifacts = finished["artifacts"]

    def scores(paths):
        prior, conditional = (
            np.concatenate([read_table(path)["value"].to_numpy() for path in paths(name)])
            for name in ("prior", "conditional")
        )
        return (prior - conditional).astype(np.float64)

    pool = scores(lambda name: [p.uri for p in open_artifact(artifacts["scores"][name]).parts])
    heldout = scores(lambda name: artifacts["heldout_scores"][name])
    run = f"{world}/store/runs/{Path(finished['run']).name}"
    (table,) = read(run).find("scores", "table")
    rows = {row[0]: row[1:] for row in table.rows}
    for name, values in (("held-out target text", heldout), ("the pool", pool)):
        count, moments = rows[name]
        assert count == len(values)
        assert moments == pytest.approx([np.mean(values), np.std(values)], rel=1e-6)
    assert np.mean(heldout) > np.mean(pool)


def test_large_inputs_are_digested_on_the_cluster(ray_cluster, world, tmp_path, monkeypatch):
    here = []
    monkeypatch.setattr(digests_module, "digest_file", here.append)  # the workers have their own
    monkeypatch.setattr(digests_module, "LARGE_BYTES", 0)
    run = JobRun(parse(world, store=str(tmp_path)))
    caches = [unseal(p.read_bytes(), str(p)) for p in (tmp_path / "cache").glob("*.json")]
    found = {uri: entry[2] for cache in caches for uri, entry in cache.items()}
    assert here == [] and run.finished() is None
    assert len(found) == 5 and all(
        sha256(read_bytes(uri)) == digest for uri, digest in found.items()
    )
    pickled = pickle.loads(pickle.dumps(run._store))
    assert pickled.uri == run._store.uri and pickled.map_large is None
