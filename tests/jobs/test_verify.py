"""A selection that was tampered with is told from a sound one, whatever the manifests say."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from stillhouse import open_selection
from stillhouse.fingerprint import sha256
from stillhouse.selection.ranking import ELIGIBLE
from stillhouse.selection.verification import Verifier
from stillhouse.storage.parquet import parquet_bytes, read_table


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
    return json.loads((folder / "manifest.json").read_text())


def rewrite(folder, number, change):
    """Change the table of a part, and let its manifest say that it was always so."""
    content = manifest_of(folder)
    part = content["parts"][number]
    path = folder.parents[1] / part["path"]
    table = change(read_table(str(path)))
    data = parquet_bytes(table)
    path.write_bytes(data)
    part |= {"sha256": sha256(data), "num_rows": table.num_rows, "num_bytes": len(data)}
    (folder / "manifest.json").write_text(json.dumps(content))


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


def test_a_control_is_sound_too(finished, reports):
    for uri in finished["artifacts"]["controls"].values():
        assert reports("verify", uri, "--sample", "2")[1]["problems"] == []


@pytest.mark.parametrize("kind", ["tokens", "scores", "selections"])
def test_a_flipped_byte(selection, problems, kind):
    folders = {
        "tokens": selection.parents[1] / "tokens" / manifest_of(selection)["inputs"]["tokens"],
        "scores": scores_folder(selection, "prior"),
        "selections": selection,
    }
    part = manifest_of(folders[kind])["parts"][0]["path"]
    path = selection.parents[1] / part
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert f"{path} has sha256" in problems()


def test_a_missing_part(selection, problems):
    path = selection.parents[1] / manifest_of(selection)["parts"][0]["path"]
    path.unlink()
    assert problems() == f"{path} is missing"


def test_a_part_too_many(selection, problems):
    shutil.copy(selection / "part-00000.parquet", selection / "part-00099.parquet")
    assert "part-00099.parquet is in no manifest" in problems()


def test_a_missing_ledger(selection, problems):
    (selection / "ledger.parquet").unlink()
    assert problems() == f"{selection}/ledger.parquet is missing"


def test_a_row_dropped(selection, problems):
    rewrite(selection, 0, lambda table: table.slice(1))
    assert "1 kept rows missing, 0 too many" in problems()


def test_a_row_twice(selection, problems):
    rewrite(selection, 0, lambda table: pa.concat_tables([table, table.slice(0, 1)]))
    assert "0 kept rows missing, 1 too many" in problems()


def test_a_kept_rows_tokens(selection, problems):
    ids = read_table(str(selection / "part-00000.parquet"))["input_ids"][3].as_py()
    rewrite(selection, 0, lambda table: changed(table, "input_ids", 3, ids[::-1]))
    assert "tokens of kept rows differ from the pool's" in problems()


def test_a_kept_rows_score(selection, problems):
    rewrite(selection, 0, lambda table: changed(table, "score", 3, 7.0))
    assert "scores of kept rows differ from the stored ones" in problems()


def test_a_stored_score_of_a_row_that_was_not_kept(selection, problems):
    """With its checksum made good everywhere: the cut is not the one of these scores."""
    part = Verifier(open_selection(str(selection))).ranked()[0]
    scores = part.read()
    threshold = manifest_of(selection)["totals"]["threshold"]
    row = int(np.flatnonzero((scores.fate == ELIGIBLE) & (scores.value < threshold))[0])
    rewrite(
        scores_folder(selection, "conditional"),
        0,
        lambda table: changed(table, "value", row, -50.0),
    )
    found = problems()
    assert "the stored scores give the cut Cut(" in found
    assert "part 0: 1 kept rows missing, 0 too many" in found


def test_a_stored_loss_that_the_model_does_not_give(selection, problems):
    """It changes nothing in the selection: only the model itself can tell."""
    folder = scores_folder(selection, "prior")
    rewrite(folder, 0, lambda table: changed(table, "value", 0, -50.0))
    assert "`prior` loss of part 0 row 0: stored -50.00000, the model gives" in problems(100_000)


def test_a_ledger_that_miscounts(selection, problems):
    path = selection / "ledger.parquet"
    table = read_table(str(path))
    data = parquet_bytes(changed(table, "kept", 0, table["kept"][0].as_py() + 1))
    path.write_bytes(data)
    content = manifest_of(selection)
    content["files"]["ledger.parquet"] = sha256(data)
    (selection / "manifest.json").write_text(json.dumps(content))
    assert "ledger of part 0: (said, found)" in problems()


def test_a_manifest_that_is_gone(selection, reports):
    (scores_folder(selection, "prior") / "manifest.json").unlink()
    code, found = reports("verify", str(selection))
    assert code == 3
    assert "no artifact at" in found["error"]


def test_no_selection_at_all(tmp_path, reports):
    code, found = reports("verify", str(tmp_path / "nothing" / "here"))
    assert code == 3
    assert "no artifact at" in found["error"]
