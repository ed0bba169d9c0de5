"""What a second job finds finished, and what it does again."""

import json
import shutil
from pathlib import Path

import pytest
from small import LEARNING, MODEL, Quiet, parse, rows, write, write_shard

from stillhouse import open_selection
from stillhouse.jobs.plan import plan_job
from stillhouse.jobs.run import run_job
from stillhouse.storage.sealed import seal, unseal

ALL = {"model": MODEL, "controls": ["random", "conditional_only", "dsir"], **LEARNING}


@pytest.fixture(scope="module")
def moved(finished, world, tmp_path_factory):
    """A copy of the world and its store at another place."""
    folder = tmp_path_factory.mktemp("moved") / "world"
    shutil.copytree(world, folder)
    return folder


def to_do(result):
    """Steps that had something to do: (parts, reused)."""
    return {
        name: (work["parts"], work["reused"])
        for name, work in result["work"].items()
        if work["parts"] != work["reused"]
    }


def test_another_folder_name_or_width_has_nothing_to_do(moved, finished):
    result = run_job(parse(moved, train=ALL, name="again", compute={"scorers": 7}), Quiet())
    assert result["status"] == "nothing_to_do"
    assert result["artifacts"] == finished["artifacts"]


def test_another_tau_only_selects(moved):
    assert set(to_do(run_job(parse(moved, selection={"tau": 11.5}), Quiet()))) == {"selection"}


def test_documents_are_read_from_where_they_are_now(moved, world, finished, tmp_path):
    """The raw files are no longer where the store's manifests say."""
    folder = tmp_path / "world"
    shutil.copytree(moved, folder)
    tokens = Path(folder / "store" / "tokens")
    for manifest in tokens.glob("*/manifest.json"):
        content = json.dumps(unseal(manifest.read_bytes(), "")).replace(str(world), "/gone")
        manifest.write_bytes(seal(json.loads(content), indent=1))
    result = run_job(parse(folder, selection={"tau": 7.25, "grain": "documents"}), Quiet())
    assert {"selection"} <= set(to_do(result)) <= {"rank", "selection"}


def test_another_target_scores_only_the_conditional(moved):
    write(moved / "law" / "law.parquet", rows(8, 120, ["law"], prefix="l"))
    target = {"path": str(moved / "law"), "heldout": 0.2}
    result = run_job(parse(moved, target=target), Quiet())
    work = result["work"]
    parts, held = work["score prior"]["parts"], len(result["artifacts"]["heldout_scores"]["prior"])
    assert work["train prior"]["reused"] == 1
    assert work["score prior"]["reused"] == parts - held  # all but the new held-out text
    assert work["score conditional"] == {"parts": parts, "reused": 0}
    assert work["tokens"]["parts"] - work["tokens"]["reused"] == 2  # its two sides
    assert work["scan"]["parts"] - work["scan"]["reused"] == 1
    assert result["selection"]["sources"]["law"]["kept_tokens"] > (
        0.8 * result["selection"]["num_tokens"]
    )


def kept_rows(result):
    """The kept sequences with the documents that own them, parts and files aside."""
    table = open_selection(result["run"]).to_arrow().read_all()
    rows = table.select(["input_ids", "documents"]).to_pylist()
    return {
        (tuple(row["input_ids"]), tuple(piece["id"] for piece in row["documents"])) for row in rows
    }


def test_with_a_fixed_threshold_a_selection_only_grows(moved, finished):
    """A new shard is tokenised and scored by each model; nothing is trained."""
    selection = {"min_score": finished["selection"]["threshold"]}
    before = run_job(parse(moved, selection=selection), Quiet())
    write_shard(moved, 8, per_shard=20)
    after = run_job(parse(moved, selection=selection), Quiet())
    made = {name: work["parts"] - work["reused"] for name, work in after["work"].items()}
    assert made["tokenizer"] == made["train prior"] == made["train conditional"] == 0
    assert made["tokens"] == made["score prior"] == made["score conditional"] == 1
    assert kept_rows(before) < kept_rows(after)
    prior = {"model": MODEL, "num_tokens": 6000, **LEARNING, "pin": "refresh"}
    steps = plan_job(parse(moved, selection=selection, prior=prior))["steps"]
    assert steps["tokens"]["reused"] == steps["tokens"]["parts"]
    assert steps["train prior"]["reused"] == 0


def test_a_refreshed_pin_trains_on_all_shards(moved):
    """The pool grew: `first` keeps the prior, `refresh` trains another one and scores anew."""
    write_shard(moved, 7, per_shard=20)
    kept = plan_job(parse(moved, selection={"tau": 10}))["steps"]
    assert kept["train prior"]["seconds"] == 0
    prior = {"model": MODEL, "num_tokens": 6000, **LEARNING, "pin": "refresh"}
    steps = plan_job(parse(moved, selection={"tau": 10}, prior=prior))["steps"]
    assert (steps["train prior"]["parts"], steps["train prior"]["reused"]) == (1, 0)
    assert steps["train prior"]["seconds"] > 0
    assert steps["tokens"]["reused"] == steps["tokens"]["parts"] - 1 == kept["tokens"]["reused"]
    for step in ("train conditional", "score prior", "score conditional"):
        assert steps[step]["reused"] == 0 < kept[step]["reused"]
        assert steps[step]["flops"] > 0


def test_a_changed_file_of_the_same_size_is_noticed(world, finished, tmp_path):
    folder = tmp_path / "world"
    shutil.copytree(world, folder)
    lines = [json.dumps(row) for row in rows(3, 12, ["food"])]
    path = folder / "pool" / "more.jsonl"
    path.write_text("\n".join(lines))
    pool = {"path": str(folder / "pool")}
    first = plan_job(parse(folder, pool=pool))
    path.write_text(path.read_text().replace("flour", "flower"[:5]).replace("sugar", "raguS"))
    assert plan_job(parse(folder, pool=pool))["run"] != first["run"]
