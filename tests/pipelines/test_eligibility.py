"""Duplicates, contamination and NaN scores, in one small pool made for them."""

import shutil

import numpy as np
import pytest
from small import Quiet, parse, rows, write, write_spec

from stillhouse import open_artifact, open_selection
from stillhouse.jobs.run import run_job
from stillhouse.jobs.verify import verify
from stillhouse.storage.parquet import read_table

HELD = "salt wind on the old harbour wall and gulls above nine grey boats that wait for the tide"

SHORT = list("abcdefghijklmnopqrstuvwxyz0123456789")


@pytest.fixture(scope="module")
def broken(given, tmp_path_factory):
    """The prior with one token's input embedding NaN: rows that hold it have no loss.

    Also where it stands last: attention multiplies its values by zero, and 0 NaN is NaN.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("broken") / "prior"
    model = AutoModelForCausalLM.from_pretrained(given["prior"]["path"])
    words = AutoTokenizer.from_pretrained(given["tokenizer"]["path"])
    token = words(" flour")["input_ids"][-1]
    head = model.get_output_embeddings().weight.detach().clone()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(head)
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")
    model.save_pretrained(folder)
    return str(folder), token


@pytest.fixture(scope="module")
def made(ray_cluster, given, broken, tmp_path_factory):
    folder = tmp_path_factory.mktemp("eligibility")
    found = rows(1, 60, ["sea", "food"])
    copies = [row | {"id": f"copy-{row['id']}", "text": row["text"].upper()} for row in found[:5]]
    leak = found[7] | {"id": "leak", "text": found[7]["text"] + " so " + HELD + " and on"}
    write(folder / "pool" / "a.parquet", found)
    others = rows(2, 20, ["food"], prefix="e")
    short = [{"id": name, "text": name, "source": "sea"} for name in SHORT]
    write(folder / "pool" / "b.parquet", [*copies, leak, *others, *short])
    write(folder / "target" / "t.parquet", rows(3, 20, ["sea"]))
    write(folder / "held" / "h.parquet", [{"id": "h", "text": HELD + " " + HELD, "source": "sea"}])
    target = {"path": str(folder / "target"), "heldout": {"path": str(folder / "held")}}
    sections = given | {"prior": {"path": broken[0]}}
    spec = parse(folder, target=target, selection={"fraction": 0.3}, **sections)
    return run_job(spec, Quiet())


@pytest.fixture(scope="module")
def table(made):
    return open_selection(made["run"]).to_arrow().read_all()


@pytest.fixture(scope="module")
def pool_rows(made):
    """Every row of the pool: (ids of its documents, its tokens)."""
    parts = [read_table(p.uri) for p in open_artifact(made["artifacts"]["tokens"]).parts]
    return [
        ([d["id"] for d in row["documents"]], row["input_ids"])
        for part in parts
        for row in part.to_pylist()
    ]


def test_later_copies_are_dropped_and_counted(made, pool_rows):
    ids = {name for names, _ in pool_rows for name in names}
    assert not any(name.startswith("copy-") for name in ids)
    assert {"d0", "d1", "d2", "d3", "d4"} <= ids
    assert made["dropped"]["duplicate"] == 5


def test_documents_that_lie_behind_the_last_sequence_are_counted(made, pool_rows):
    """The last ones of the last file: two tokens each, less than a sequence in all."""
    ids = {name for names, _ in pool_rows for name in names}
    left = [name for name in SHORT if name not in ids]
    assert 0 < len(left) < len(SHORT)
    assert made["dropped"]["left over at the end of a part"] == len(left)


def test_contaminated_rows_are_counted_and_not_kept(made, table, pool_rows):
    holding = [names for names, _ in pool_rows if "leak" in names]
    fates = made["selection"]["fates"]
    assert 0 < fates["contaminated"] <= len(holding)
    kept = {d["id"] for row in table["documents"].to_pylist() for d in row}
    assert "leak" not in kept


def test_rows_without_a_score_are_counted_and_not_kept(made, table, broken, pool_rows):
    token = broken[1]
    bad = sum(token in ids for _, ids in pool_rows)
    fates = made["selection"]["fates"]
    assert 0 < bad - fates["contaminated"] <= fates["nan"] <= bad
    assert np.isfinite(table["score"].to_numpy()).all()
    assert not any(token in ids for ids in table["input_ids"].to_pylist())
    assert sum(fates.values()) == len(pool_rows)


def test_verify_agrees(made):
    assert verify(made["run"], 10_000)["problems"] == []


def test_what_is_allowed_is_kept(made, given, broken, tmp_path):
    """With everything switched off the copies are in the pool and the leak is eligible."""
    folder = tmp_path / "world"
    root = made["run"].rsplit("/", 3)[0]
    shutil.copytree(root, folder)
    target = {"path": str(folder / "target"), "heldout": {"path": str(folder / "held")}}
    selection = {"min_score": -99, "exclude_contaminated": False}
    sections = given | {"prior": {"path": broken[0]}}
    spec = parse(folder, target=target, selection=selection, deduplicate=False, **sections)
    result = run_job(spec, Quiet())
    kept = open_selection(result["run"]).to_arrow(["documents"]).read_all()
    ids = {d["id"] for row in kept["documents"].to_pylist() for d in row}
    assert "leak" in ids or result["selection"]["fates"]["nan"] > 0
    assert any(name.startswith("copy-") for name in ids)
    assert result["dropped"].get("duplicate", 0) == 0


def test_a_pool_that_is_all_contaminated(ray_cluster, untrained, tmp_path, reports):
    """The pool is the held-out text: nothing is eligible, and the message says why."""
    found = [row | {"text": f"{HELD} {row['text']}"} for row in rows(1, 12, ["sea"])]
    write(tmp_path / "pool" / "a.parquet", found)
    write(tmp_path / "target" / "t.parquet", rows(3, 20, ["sea"]))
    write(tmp_path / "held" / "h.parquet", found[:1] + rows(9, 3, ["food"], prefix="f"))
    target = {"path": str(tmp_path / "target"), "heldout": {"path": str(tmp_path / "held")}}
    write_spec(tmp_path, target=target, selection={"fraction": 0.5}, **untrained)
    code, said = reports("run", str(tmp_path / "spec.yaml"))
    assert code == 2
    scored = next((tmp_path / "store" / "scores").glob("*/manifest.json")).parent
    count = sum(part.num_rows for part in open_artifact(str(scored)).parts)
    assert f"0 of {count} rows are eligible: {count} share 13 words with the" in said["error"]
    assert "`selection.exclude_contaminated: false`" in said["error"]
    assert f"cannot keep {count // 2} of 0 rows: none is eligible" in said["error"]
