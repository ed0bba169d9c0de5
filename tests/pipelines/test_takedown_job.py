"""A take-down and a benchmark after a finished job: scores are reused, what is named is gone."""

import json
import shutil

import pytest
from small import STYLES, Quiet, parse, rows

from stillhouse import open_selection
from stillhouse.jobs.run import run_job
from stillhouse.jobs.verify import verify
from stillhouse.text.duplicates import document_hash

TEXTS = {
    row["id"]: row["text"] for i in range(4) for row in rows(100 + i, 120, list(STYLES), f"s{i}-")
}


def kept_ids(result):
    """The documents of a selection, those with most rows first."""
    table = open_selection(result["run"]).to_arrow().read_all()
    if "id" in table.column_names:
        return table["id"].to_pylist()
    found = [piece["id"] for row in table["documents"].to_pylist() for piece in row]
    return sorted(set(found), key=lambda name: (-found.count(name), name))


@pytest.fixture(scope="module")
def again(finished, world, tmp_path_factory):
    """The finished job again, without three of the documents it kept; and these."""
    folder = tmp_path_factory.mktemp("takedown") / "world"
    shutil.copytree(world, folder)
    by_id, by_hash, benchmark = kept_ids(finished)[:3]
    (folder / "ids.txt").write_text(f"{by_id}\nnobody\n")
    (folder / "hashes.txt").write_text(document_hash(TEXTS[by_hash].upper()).hex())
    row = {"question": " ".join(TEXTS[benchmark].split()[:15]), "answer": "yes"}
    (folder / "bench.jsonl").write_text(json.dumps(row))
    spec = {
        "exclude": {kind: str(folder / f"{kind}.txt") for kind in ("ids", "hashes")},
        "decontaminate": [
            {
                "path": str(folder / "bench.jsonl"),
                "columns": {"prompt": "question", "text": "answer"},
            }
        ],
    }
    result = run_job(parse(folder, **spec), Quiet())
    return folder, spec, (by_id, by_hash, benchmark), result


def test_what_is_named_is_left_out_and_counted(again, finished):
    _, _, named, result = again
    assert not set(named) & set(kept_ids(result))
    fates = result["selection"]["fates"]
    assert fates["taken down"] > 1 and sum(fates.values()) == sum(
        finished["selection"]["fates"].values()
    )
    assert fates["kept"] == finished["selection"]["fates"]["kept"]  # others moved up
    assert result["exclude"] == {
        "ids": {"listed": 2, "found": 1},
        "hashes": {"listed": 1, "found": 1},
        "num_documents": 2,
    }
    (count,) = result["decontaminate"].values()
    assert 0 < count <= fates["contaminated"] + fates["taken down"]
    assert verify(result["run"], 8)["problems"] == []


def test_nothing_but_the_cut_is_made_again(again):
    work = again[3]["work"]
    new = {name for name, w in work.items() if w["parts"] != w["reused"]}
    assert new == {"scan", "take down", "decontamination", "rank", "selection"}
    assert work["scan"]["parts"] - work["scan"]["reused"] == 1  # the benchmark


def test_documents_are_taken_down_alone(again):
    """With `grain: documents` neighbours in a sequence stay; a useless list is a warning."""
    folder, spec, (by_id, by_hash, _), _ = again
    (folder / "hashes.txt").write_text("0" * 32)
    selection = {"min_score": -99, "grain": "documents", "exclude_contaminated": False}
    spec = {"exclude": spec["exclude"], "selection": selection | {"exclude_prior_rows": False}}
    result = run_job(parse(folder, **spec), Quiet())
    assert result["selection"]["fates"]["taken down"] == 1
    kept = set(kept_ids(result))
    assert by_id not in kept and by_hash in kept
    assert "None of the hashes in `exclude.hashes` is in the pool" in result["warnings"]
    assert verify(result["run"], 8)["problems"] == []
