"""`verify` tells a store that was tampered with from a sound one, whatever its manifests say."""

import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from small import about

from stillhouse import open_selection
from stillhouse.fingerprint import sha256
from stillhouse.jobs.prune import prune_store
from stillhouse.jobs.verify import verify
from stillhouse.selection.ranking import ELIGIBLE
from stillhouse.selection.verification import Verifier
from stillhouse.storage.parquet import parquet_bytes, read_table
from stillhouse.storage.sealed import seal, unseal


@pytest.fixture
def selection(finished, tmp_path):
    """A copy of the finished job's store without its models: the selection's folder in it."""
    store = Path(finished["run"]).parents[1]
    for kind in ("tokens", "scores", "selections", "models", "runs"):
        shutil.copytree(store / kind, tmp_path / kind)
    return tmp_path / "selections" / finished["selection_fingerprint"]


@pytest.fixture
def problems(selection, reports):
    """What the command line finds wrong with it; it must agree with its exit code."""

    def call(sample=0):
        code, found = reports("verify", str(selection), "--sample", str(sample))
        assert code == (3 if found["problems"] else 0)
        return " | ".join(found["problems"])

    return call


def manifest_of(folder):
    place = folder if (folder / "manifest.json").exists() else about(folder)
    return unseal((place / "manifest.json").read_bytes(), str(folder))


def rewrite(folder, number, change):
    """Change the table of a part, and its checksum in manifests and receipts."""
    store = folder.parents[1]
    name = manifest_of(folder)["parts"][number]["path"]
    table = change(read_table(str(store / name)))
    data = parquet_bytes(table)
    (store / name).write_bytes(data)
    new = {"sha256": sha256(data), "num_rows": table.num_rows, "num_bytes": len(data)}
    kind = store / folder.parent.name
    for path in [*kind.rglob("manifest.json"), *kind.glob("receipts/*.json")]:
        content = unseal(path.read_bytes(), str(path))
        for part in content["parts"]:
            if part["path"] == name:
                part |= new
                path.write_bytes(seal(content))


def scores_folder(selection, name):
    return selection.parents[1] / "scores" / manifest_of(selection)["inputs"]["scores"][name]


def changed(table, column, row, value):
    values = table[column].to_pylist()
    values[row] = value
    index = table.column_names.index(column)
    return table.set_column(index, table.field(index), pa.array(values, table.field(index).type))


def test_a_sound_one(problems, finished, reports):
    assert problems(sample=32) == ""
    code, found = reports("verify", finished["run"], "--sample", "4")
    assert (code, found["problems"]) == (0, [])
    assert found["checked"]["rows"] == sum(finished["selection"]["fates"].values())
    assert found["checked"]["losses"] == 8
    for uri in finished["artifacts"]["controls"].values():
        assert reports("verify", uri, "--sample", "2")[1]["problems"] == []


@pytest.fixture
def store(finished, tmp_path):
    """A copy of the finished job's store, without what the runs of other tests left in it."""
    run, store = Path(finished["run"]), tmp_path / "store"
    shutil.copytree(run.parents[1], store)
    for other in (store / "runs").iterdir():
        if other.name != run.name:
            shutil.rmtree(other)
    prune_store(str(store), grace_hours=0, yes=True)
    return store


def kinds_of_objects(store, left_out):
    """One object of each kind: of the paths that differ in fingerprints and numbers, the first."""
    kinds = {}
    for path in sorted(p for p in store.rglob("*") if p.is_file()):
        name = str(path.relative_to(store))
        if re.fullmatch(left_out, name) is None:
            kinds.setdefault(re.sub(r"[0-9a-f]{64}|\d+", "*", name), path)
    return kinds


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 4
    path.write_bytes(data)


PROVISIONAL = r"store\.json|(pins|cache|names|ranks|selections/receipts)/.*|runs/[^/]+/status\.json"
"""What no result rests on: it can be made again, or only points to things."""
OF_A_RUN = {
    "models/*/model.safetensors",
    "models/*/tokenizer.json",
    "models/*/trained_on.parquet",
    "models/*/manifest.json",
    "runs/*/spec.yaml",
    "runs/*/result.json",
    "runs/*/digests.json",
    "runs/*/report.json",
    "runs/*/report.html",
    "runs/*/events-*.jsonl",
    "scans/parts/*-*.parquet",
    "scans/receipts/*.json",
    "drops/parts/*-*.parquet",
    "drops/receipts/*.json",
    "tokens/parts/*-*.parquet",
    "tokens/receipts/*.json",
    "tokens/labels/*.parquet",
    "tokens/*/manifest.json",
    "scores/parts/*-*.parquet",
    "scores/receipts/*.json",
    "scores/*/manifest.json",
    "selections/about/*/ledger.parquet",
    "selections/*/part-*.parquet",
    "selections/about/*/manifest.json",
}


@pytest.mark.parametrize("place", [0, -1])
def test_a_flipped_bit_in_any_object_that_a_run_rests_on(store, finished, reports, place):
    run = store / "runs" / Path(finished["run"]).name
    kinds = kinds_of_objects(store, PROVISIONAL)
    assert kinds.keys() >= OF_A_RUN
    for path in kinds.values():
        flip(path, place)
        code, found = reports("verify", str(run), "--sample", "0")
        assert code == 3
        assert [p for p in found["problems"] if str(path) in p] != [], path
        flip(path, place)
    assert reports("verify", str(run), "--sample", "0")[1]["problems"] == []


def test_a_flipped_bit_in_any_object_of_a_store(store, finished, reports):
    selection = store / "selections" / finished["selection_fingerprint"]
    assert reports("publish", "sea", "--to", str(selection), "--store", str(store))[0] == 0
    kinds = kinds_of_objects(store, r"store\.json|runs/[^/]+/status\.json")
    assert kinds.keys() >= OF_A_RUN | {"names/sea/*.json", "pins/*/*.json", "cache/*.json"}
    for path in kinds.values():
        flip(path, 40)
        code, found = reports("verify", str(store))
        assert code == 3
        assert [p for p in found["problems"] if str(path) in p] != [], path
        flip(path, 40)
    code, found = reports("verify", str(store))
    assert (code, found["problems"], found["store"]) == (0, [], str(store))


def test_a_changed_manifest_and_an_artifact_that_is_gone(store, finished, reports):
    """A target model, which only the result names."""
    path = store / "selections/about" / finished["selection_fingerprint"] / "manifest.json"
    text, tokens = path.read_text(), finished["selection"]["num_tokens"]
    assert str(tokens) in text
    path.write_text(text.replace(str(tokens), str(tokens + 1)))
    model = store / "models" / Path(finished["artifacts"]["targets"]["random"][0]).name
    shutil.rmtree(model)
    code, found = reports("verify", str(store / "runs" / Path(finished["run"]).name))
    assert code == 3
    assert any(f"{path} is not what was written" in problem for problem in found["problems"])
    assert any(f"{model} is missing" in problem for problem in found["problems"])


def test_a_large_store_is_checked_in_tasks(store):
    path = next((store / "scores" / "parts").glob("*.parquet"))
    flip(path, 1000)
    problems = verify(str(store), 0, large_bytes=1)["problems"]
    assert len(problems) == 1
    assert f"{path} has sha256 {sha256(path.read_bytes())[:12]}, scores/" in problems[0]


def drop_row(selection):
    rewrite(selection, 0, lambda table: table.slice(1))


def repeat_row(selection):
    rewrite(selection, 0, lambda table: pa.concat_tables([table, table.slice(0, 1)]))


def reverse_tokens(selection):
    ids = read_table(str(selection / "part-00000.parquet"))["input_ids"][3].as_py()
    rewrite(selection, 0, lambda table: changed(table, "input_ids", 3, ids[::-1]))


def change_kept_score(selection):
    rewrite(selection, 0, lambda table: changed(table, "score", 3, 7.0))


def raise_stored_score(selection):
    """Of a row that was not kept, with its checksum made good everywhere."""
    scores = Verifier(open_selection(str(selection))).ranked[0].read()
    threshold = manifest_of(selection)["totals"]["threshold"]
    row = int(np.flatnonzero((scores.fate == ELIGIBLE) & (scores.value < threshold))[0])
    folder = scores_folder(selection, "conditional")
    rewrite(folder, 0, lambda table: changed(table, "value", row, -50.0))


def change_loss(selection):
    """It changes nothing in the selection: only the model itself can tell."""
    folder = scores_folder(selection, "prior")
    rewrite(folder, 0, lambda table: changed(table, "value", 0, -50.0))


def miscount(selection):
    path = about(selection) / "ledger.parquet"
    table = read_table(str(path))
    data = parquet_bytes(changed(table, "kept", 0, table["kept"][0].as_py() + 1))
    path.write_bytes(data)
    content = manifest_of(selection)
    content["files"]["ledger.parquet"] = sha256(data)
    (about(selection) / "manifest.json").write_bytes(seal(content))


@pytest.mark.parametrize(
    ("tamper", "sample", "expected"),
    [
        (drop_row, 0, "1 kept rows missing, 0 too many"),
        (repeat_row, 0, "0 kept rows missing, 1 too many"),
        (reverse_tokens, 0, "tokens of kept rows differ from the pool's"),
        (change_kept_score, 0, "scores of kept rows differ from the stored ones"),
        (raise_stored_score, 0, "the stored scores give the cut Cut("),
        (raise_stored_score, 0, "part 0: 1 kept rows missing, 0 too many"),
        (change_loss, 100_000, "`prior` loss of part 0 row 0: stored -50.00000, the model gives"),
        (miscount, 0, "ledger of part 0: (said, found)"),
    ],
)
def test_what_was_changed_and_sealed_again(selection, problems, tamper, sample, expected):
    tamper(selection)
    assert expected in problems(sample)


def test_files_that_are_gone_or_too_many(selection, problems, reports):
    for name in ("part-00099.parquet", "mine.parquet"):
        shutil.copy(selection / "part-00000.parquet", selection / name)
    found = problems()
    assert "part-00099.parquet is in no manifest" in found
    assert "mine.parquet is in no manifest" in found
    path = selection.parents[1] / manifest_of(selection)["parts"][0]["path"]
    ledger = about(selection) / "ledger.parquet"
    path.unlink()
    ledger.unlink()
    found = problems()
    assert f"{path} is missing, " in found
    by = f"selections/about/{selection.name}/manifest.json"
    assert f"{ledger} is missing, {by} names it" in found


def test_an_artifact_that_is_not_there(selection, reports):
    (scores_folder(selection, "prior") / "manifest.json").unlink()
    for uri in (selection, selection.parent / "nothing" / "here"):
        code, found = reports("verify", str(uri))
        assert (code, "no artifact at" in found["error"]) == (3, True)
