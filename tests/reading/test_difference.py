"""Comparisons of selections, against sets of rows that are made by hand from their folders."""

import shutil
from collections import Counter
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import spearmanr
from small import Quiet, parse, rows, write

from stillhouse import open_artifact, open_selection
from stillhouse.jobs.run import run_job
from stillhouse.reading.difference import compare


def rows_of(uri):
    return pa.concat_tables(
        pq.read_table(path) for path in sorted(Path(uri).glob("*.parquet"))
    ).to_pylist()


def sequences(uri):
    """Kept rows by (content of the token part, row)."""
    selection = open_selection(uri)
    tokens = open_artifact(f"{selection.store}/tokens/{selection.manifest.inputs['tokens']}")
    parts = [sha256(Path(part.uri).read_bytes()).hexdigest() for part in tokens.parts]
    return {(parts[row["part"]], row["row"]): row for row in rows_of(uri)}


def documents(uri, world):
    """Best score of each kept document by its id, which is its own in the whole pool."""
    found = {}
    for row in rows_of(uri):
        for one in row.get("documents", [row]):
            found[one["id"]] = max(row["score"], found.get(one["id"], -np.inf))
    return found


def tokens_by_source(kept):
    counted = Counter()
    for row in kept:
        for piece in row["documents"]:
            counted[piece["source"]] += piece["end"] - piece["start"]
    return counted


@pytest.fixture(scope="module")
def pair(finished):
    """What the job kept, and what its control kept."""
    return finished["artifacts"]["selection"], finished["artifacts"]["controls"]["dsir"]


def test_rows_of_one_pool(pair):
    a, b = map(sequences, pair)
    found = compare(*map(open_selection, pair))
    both = a.keys() & b.keys()
    assert 0 < len(both) < len(a)
    assert found["unit"] == "sequences"
    assert found["kept"] == {
        "a": len(a),
        "b": len(b),
        "both": len(both),
        "only_a": len(a.keys() - b.keys()),
        "only_b": len(b.keys() - a.keys()),
    }
    assert found["jaccard"] == len(both) / len(a.keys() | b.keys())
    scores = [[side[key]["score"] for key in both] for side in (a, b)]
    assert found["rank_correlation"] == pytest.approx(spearmanr(*scores).statistic)
    assert found["mean_score"]["a_both"] == pytest.approx(np.mean(scores[0]))
    assert found["settings"]["rule"] == ["color", "dsir"]


def test_tokens_by_source(pair):
    a, b = map(sequences, pair)
    found = {row["source"]: row for row in compare(*map(open_selection, pair))["sources"]}
    for side, other, name in ((a, b, "a"), (b, a, "b")):
        alone = [row for key, row in side.items() if key not in other]
        for source, tokens in tokens_by_source(side.values()).items():
            assert found[source][f"{name}_tokens"] == tokens
            assert found[source][f"{name}_only_tokens"] == tokens_by_source(alone)[source]


def test_rows_that_differ_are_written(pair, tmp_path):
    a, b = map(sequences, pair)
    compare(*map(open_selection, pair), rows_to=str(tmp_path / "rows.parquet"))
    found = Counter()
    for row in pq.read_table(tmp_path / "rows.parquet").to_pylist():
        raw = pq.read_table(row["file"]).to_pylist()[row["row"]]
        assert (raw["id"], raw["source"]) == (row["id"], row["source"])
        found[row["side"], row["id"], row["score"]] += 1
    expected = Counter(
        (name, piece["id"], row["score"])
        for name, side, other in (("a", a, b), ("b", b, a))
        for key, row in side.items()
        if key not in other
        for piece in row["documents"]
    )
    assert found == expected


def test_a_selection_and_itself(pair):
    found = compare(*[open_selection(pair[0])] * 2)
    assert found["jaccard"] == 1 and found["settings"] == {}
    assert found["kept"]["only_a"] == found["kept"]["only_b"] == 0
    assert found["mean_score"]["a_only"] is None


def test_documents_where_rows_are_not_the_same_kind(pair, world):
    settings = {"grain": "documents", "fraction": 0.3, "exclude_contaminated": False}
    whole = run_job(parse(world, selection=settings), Quiet())["artifacts"]["selection"]
    a, b = documents(pair[0], world), documents(whole, world)
    found = compare(open_selection(pair[0]), open_selection(whole))
    assert found["unit"] == "documents"
    assert found["kept"]["both"] == len(a.keys() & b.keys()) > 0
    assert found["kept"]["only_b"] == len(b.keys() - a.keys())
    both = sorted(a.keys() & b.keys())
    expected = spearmanr([a[key] for key in both], [b[key] for key in both]).statistic
    assert found["rank_correlation"] == pytest.approx(expected)


def test_a_pool_that_grew_in_another_store(pair, world, given, tmp_path):
    """Parts have other numbers there; their content is the same."""
    shutil.copytree(world / "pool", tmp_path / "pool")
    shutil.copytree(world / "target", tmp_path / "target")
    write(tmp_path / "pool" / "a-new.parquet", rows(7, 120, ["sea", "law"], prefix="new"))
    made = run_job(parse(tmp_path, **given), Quiet())["artifacts"]["selection"]
    a, b = sequences(pair[0]), sequences(made)
    found = compare(open_selection(pair[0]), open_selection(made))
    assert found["unit"] == "sequences"
    assert found["kept"]["both"] == len(a.keys() & b.keys()) > 0
    assert "tokens" in found["settings"]


def test_on_the_command_line(reports, pair, finished):
    code, found = reports("diff", *pair)
    assert code == 0 and found["kept"]["both"] > 0
    code, found = reports("diff", pair[0], finished["artifacts"]["prior"])
    assert code == 3
