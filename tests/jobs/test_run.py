"""The whole select job, in this process and from the command line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from result_keys import check_keys
from small import LEARNING, MODEL, Quiet, digests, own_packages, parse, write_spec

from stillhouse import open_artifact, open_selection
from stillhouse.jobs.run import run_job
from stillhouse.report.page import read
from stillhouse.storage.parquet import read_table

KINDS = ("tokens", "scores", "selections", "models")
STILLHOUSE = str(Path(sys.executable).with_name("stillhouse"))


def test_result_is_the_contract(finished):
    assert (finished["status"], finished["job"]) == ("done", "select")
    check_keys(finished)
    assert {"prior", "conditional"} <= set(finished["artifacts"]["scores"])
    assert set(finished["selection"]["sources"]) == {"sea", "code", "law", "food"}
    assert set(finished["target"]) == {"color", "random", "conditional_only", "dsir"}
    assert finished["work"]["tokens"]["reused"] == 0
    assert Path(finished["report"]).read_text().startswith("<!doctype html>")
    json.dumps(finished, allow_nan=False)


def test_counts_agree(finished):
    pool = open_artifact(finished["artifacts"]["tokens"])
    kept = finished["selection"]
    assert kept["num_sequences"] == int(pool.num_rows / 8)
    assert kept["num_tokens"] == kept["num_sequences"] * 32
    assert sum(kept["fates"].values()) == pool.num_rows
    assert kept["fates"]["kept"] == kept["num_sequences"]
    assert sum(s["pool_tokens"] for s in kept["sources"].values()) == pool.num_tokens
    assert sum(s["kept_tokens"] for s in kept["sources"].values()) == kept["num_tokens"]
    parts = len(pool.parts)
    heldout = open_artifact(finished["artifacts"]["heldout_tokens"]).parts
    assert finished["work"]["scores"] == {"parts": 2 * (parts + len(heldout)), "reused": 0}
    assert {n: len(p) for n, p in finished["artifacts"]["heldout_scores"].items()} == {
        "prior": len(heldout),
        "conditional": len(heldout),
    }
    assert all(
        t["num_tokens"] == finished["target"]["color"]["num_tokens"]
        for t in finished["target"].values()
    )


def test_what_was_deleted_by_hand_is_made_again(finished, world, tmp_path):
    """A part of tokens, scores and selection, and a model: the same bytes stand there again."""
    store = tmp_path / "store"
    shutil.copytree(world / "store", store)
    before = digests(store, *KINDS)
    selected = open_artifact(finished["artifacts"]["selection"]).parts[0]
    lost = [
        *(next((store / kind / "parts").glob("*.parquet")) for kind in ("tokens", "scores")),
        store / Path(selected.uri).relative_to(world / "store"),
        store / "models" / Path(finished["artifacts"]["conditional"]).name / "model.safetensors",
    ]
    for path in lost:
        path.unlink()
    train = {"model": MODEL, "controls": ["random", "conditional_only", "dsir"], **LEARNING}
    again = run_job(parse(world, store=str(store), train=train), Quiet())
    assert again["status"] == "done"
    assert digests(store, *KINDS) == before
    made = {name: w["parts"] - w["reused"] for name, w in again["work"].items()}
    assert made["tokens"] == made["scores"] == made["selection"] == made["train conditional"] == 1
    assert made["train prior"] == made["train targets"] == 0


def test_every_step_spent_time(finished):
    seconds = finished["cost"]["device_seconds"]
    assert [n for n, s in seconds.items() if n.startswith(("train", "score")) and not s > 0] == []


def test_selection_finds_the_target_domain(finished):
    sources = finished["selection"]["sources"]
    assert sources["sea"]["kept_tokens"] > 0.8 * finished["selection"]["num_tokens"]
    targets = {name: row["heldout_nll"] for name, row in finished["target"].items()}
    assert targets["color"] < targets["random"] - 0.3


@pytest.mark.parametrize("place", ["run", "selection"])
def test_selection_opens_without_ray(finished, place):
    uri = finished["run"] if place == "run" else finished["artifacts"]["selection"]
    selection = open_selection(uri)
    table = selection.to_arrow().read_all()
    assert table.num_rows == selection.num_rows == finished["selection"]["num_sequences"]
    assert {
        "input_ids",
        "documents",
        "score",
        "prior_nll",
        "conditional_nll",
        "part",
        "row",
    } <= set(table.column_names)
    score = table["score"].to_numpy()
    losses = table["prior_nll"].to_numpy() - table["conditional_nll"].to_numpy()
    np.testing.assert_array_equal(score, losses)
    assert score.min() == np.float32(selection.threshold)


def test_rows_say_where_they_come_from(finished, world):
    selection = open_selection(finished["artifacts"]["selection"])
    found = selection.provenance(3)
    assert Path(found["documents"][0]["file"]).parent == world / "pool"
    assert found["documents"][0]["id"].startswith("s")
    pool = open_artifact(finished["artifacts"]["tokens"])
    assert found["token_part"] == pool.manifest.parts[found["part"]].path


def test_models_load_in_transformers(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for folder in (finished["artifacts"]["prior"], finished["artifacts"]["targets"]["color"][0]):
        model = AutoModelForCausalLM.from_pretrained(folder)
        words = AutoTokenizer.from_pretrained(folder)
        batch = words("the ship wind wave sail", return_tensors="pt")
        assert model(input_ids=batch["input_ids"]).logits.isfinite().all()
        assert words.decode(batch["input_ids"][0]) == "the ship wind wave sail"


def test_datasets_reads_the_parts_without_us(finished):
    import datasets

    pattern = finished["artifacts"]["selection"] + "/part-*.parquet"
    rows = datasets.load_dataset("parquet", data_files=pattern, split="train")
    assert rows.num_rows == finished["selection"]["num_sequences"]


def test_again_there_is_nothing_to_do(finished, world):
    """In a process of its own: neither Ray nor torch is imported."""
    train = {"model": MODEL, "controls": ["random", "conditional_only", "dsir"], **LEARNING}
    spec = write_spec(world, train=train)
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


def test_command_line_makes_the_same_bytes(finished, world, tmp_path):
    """Another process, another store, one Scorer, everything trained again: but for how long a
    training took, which its manifest tells.

    It runs where the user has packages of our folders' names, which no process may import.
    """
    spec = write_spec(world)
    own = own_packages(tmp_path / "project")
    environment = os.environ | {"PYTHONPATH": str(own)}
    sets = ["store=" + str(tmp_path / "store"), "compute.scorers=1"]
    sets = [word for value in sets for word in ("--set", value)]
    done = subprocess.run(
        [STILLHOUSE, "run", spec, "--json", *sets],
        cwd=own,
        env=environment,
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
    different = [path for path in different if not Path(path).match("models/*/manifest.json")]
    assert different == []
    name = open_selection(result["run"]).manifest.fingerprint
    assert name == finished["selection_fingerprint"]
    assert [line for line in done.stderr.splitlines() if "WARNING" in line or "INFO" in line] == []


def test_progress_is_told_in_whole_parts(finished, world):
    heard = Quiet()
    run_job(parse(world, selection={"tau": 9}), heard)
    begun = {step: (total, reused) for step, total, reused in heard.steps}
    assert begun["score prior"][0] == begun["score prior"][1] > 0
    assert begun["selection"] == (begun["selection"][0], 0)
    done = sum(done for step, done, _ in heard.advanced if step == "selection")
    assert done == begun["selection"][0] > 0


def test_the_report_compares_over_all_scores(finished, world):
    """Spread and means against numpy over every stored score, pool and held-out text."""
    artifacts = finished["artifacts"]
    store = f"{world}/store"

    def values(paths):
        found = [read_table(path)["value"].to_numpy() for path in paths]
        return np.concatenate(found)

    def scores(paths):
        losses = {name: values(paths(name)) for name in ("prior", "conditional")}
        return (losses["prior"] - losses["conditional"]).astype(np.float64)

    pool = scores(lambda name: [p.uri for p in open_artifact(artifacts["scores"][name]).parts])
    heldout = scores(lambda name: artifacts["heldout_scores"][name])
    (table,) = read(f"{store}/runs/{Path(finished['run']).name}").find("scores", "table")
    rows = {row[0]: row[1:] for row in table.rows}
    for name, values in (("held-out target text", heldout), ("the pool", pool)):
        count, moments = rows[name]
        assert count == len(values)
        assert moments == pytest.approx([np.mean(values), np.std(values)], rel=1e-6)
    assert np.mean(heldout) > np.mean(pool)
