"""Columns and text that kept rows carry, against the input files and the tokenizer alone."""

import json
from pathlib import Path

import datasets
import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import tokenizers
from small import Quiet, digests, rows, small_spec, write, write_spec

from stillhouse import open_selection
from stillhouse.jobs.run import run_job
from stillhouse.jobs.verify import verify
from stillhouse.spec import SelectSpec

LENGTH, PART_TOKENS = 32, 1600
pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def documents(count=60, prefix="d"):
    """Every third has no URL; the year is a number, the language lies in an object."""
    return [
        row
        | {
            "license": f"CC-{i % 4}",
            "url": None if i % 3 == 0 else f"https://example.org/{prefix}/{i}?ü",
            "year": 1990 + i,
            "meta": {"lang": "en" if i % 2 else "de", "tags": [i, i + 1]},
        }
        for i, row in enumerate(rows(count, count, ["sea", "law", "food"], prefix=prefix))
    ]


def make(folder, untrained, pool, columns=(), **selection):
    spec = small_spec(folder, **untrained, part_tokens=PART_TOKENS)
    spec["pool"] = {"path": str(folder / "pool"), "keep_columns": list(columns)}
    spec["selection"] = {"fraction": 0.4, "exclude_contaminated": False} | selection
    write(folder / "target" / "t.parquet", rows(2, 30, ["sea"], prefix="t"))
    for name, found in pool.items():
        path = folder / "pool" / name
        if name.endswith(".parquet"):
            write(path, found)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return run_job(SelectSpec.model_validate(spec), Quiet())


def packed_by_hand(pool, folder):
    """Sequences as lists of (document, start, end, ids), by part and row: one document after the
    other, each with an EOS; a part ends with the document that fills it.
    """
    words = tokenizers.Tokenizer.from_file(str(Path(folder, "tokenizer.json")))
    eos = json.loads(Path(folder, "tokenizer_config.json").read_text())["eos_token"]
    capacity = PART_TOKENS // LENGTH * LENGTH
    parts, stream = [], []
    for number, row in enumerate(pool):
        ids = [*words.encode(row["text"], add_special_tokens=False).ids, words.token_to_id(eos)]
        stream += [(number, token) for token in ids]
        if len(stream) >= capacity or number == len(pool) - 1:
            parts.append(stream)
            stream = []
    found = {}
    for part, stream in enumerate(parts):
        for row in range(len(stream) // LENGTH):
            line = stream[row * LENGTH : (row + 1) * LENGTH]
            owners = [number for number, _ in line]
            starts = {n: owners.index(n) for n in dict.fromkeys(owners)}
            pieces = [(n, start, start + owners.count(n)) for n, start in starts.items()]
            text = words.decode([token for _, token in line], skip_special_tokens=False)
            found[part, row] = (pieces, text)
    return found


def frames(uri):
    """The folder's rows by four readers."""
    yield pd.read_parquet(uri)
    yield datasets.load_dataset(uri, split="train").to_pandas()
    yield pyarrow.dataset.dataset(uri).to_table().to_pandas()
    yield duckdb.sql(f"select * from '{uri}/*.parquet'").df()


def test_sequences_carry_columns_of_each_of_their_documents_and_their_text(tmp_path, untrained):
    pool = documents()
    names = ("license", "url", "year", "meta.lang")
    result = make(tmp_path, untrained, {"a.parquet": pool}, names, text=True)
    expected = packed_by_hand(pool, untrained["tokenizer"]["path"])
    kept = result["selection"]["num_sequences"]
    assert len({part for part, _ in expected}) > 2
    assert kept == int(0.4 * len(expected))
    for frame in frames(result["artifacts"]["selection"]):
        assert len(frame) == kept
        for row in frame.to_dict("records"):
            pieces, text = expected[row["part"], row["row"]]
            assert row["text"] == text
            for piece, (number, start, end) in zip(row["documents"], pieces, strict=True):
                document = pool[number]
                assert piece["id"] == document["id"]
                assert (piece["start"], piece["end"]) == (start, end)
                assert piece["license"] == document["license"]
                assert piece["url"] == document["url"]
                assert piece["year"] == str(document["year"])
                assert piece["meta.lang"] == document["meta"]["lang"]
    assert verify(result["run"], 4)["problems"] == []
    first = open_selection(result["run"]).provenance(0)
    assert first["documents"][0]["license"].startswith("CC-")


def test_documents_get_a_column_each(tmp_path, untrained):
    """Of files of two formats, one of which lacks a column; a column is the folders' names."""
    parquet, lines = documents(), documents(40, "j")
    for row in lines:
        del row["license"]
    pool = {"lang=x%20y/a.parquet": parquet, "lang=z/b.jsonl": lines}
    names = ("license", "url", "year", "meta.tags", "lang")
    result = make(tmp_path, untrained, pool, names, grain="documents")
    by_id = {row["id"]: row for row in [*parquet, *lines]}
    for frame in frames(result["artifacts"]["selection"]):
        assert {id_[0] for id_ in frame["id"]} == {"d", "j"}
        for row in frame.astype(object).where(frame.notna(), None).to_dict("records"):
            document = by_id[row["id"]]
            assert row["text"] == document["text"]
            assert row["license"] == document.get("license")
            assert row["url"] == document["url"]
            assert row["year"] == str(document["year"])
            tags = document["meta"]["tags"]
            assert json.loads(row["meta.tags"]) == tags
            assert row["lang"] == {"d": "x y", "j": "z"}[row["id"][0]]


def test_the_setting_makes_the_selection_again_and_nothing_else(tmp_path, untrained):
    pool = {"a.parquet": documents()}
    plain = make(tmp_path, untrained, pool)
    before = digests(tmp_path / "store", "tokens", "scores", "selections", "scans")
    carrying = make(tmp_path, untrained, pool, ["license"])
    for step in ("scan", "tokens", "scores"):
        assert carrying["work"][step]["reused"] == carrying["work"][step]["parts"] > 0
    after = digests(tmp_path / "store", "tokens", "scores", "selections", "scans")
    assert {path: after[path] for path in before} == before
    added = {path.split("/")[0] for path in after.keys() - before.keys()}
    assert added == {"selections"}
    first, second = (pd.read_parquet(r["artifacts"]["selection"]) for r in (plain, carrying))
    assert first["row"].tolist() == second["row"].tolist()
    assert [*first.columns] == [*second.columns]
    assert "license" not in first["documents"][0][0]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (["license", "licence"], "has `licence`; there are: id, text, source, license, url, year"),
        (["meta.language"], "has `meta.language`; there are: "),
        (["score"], "every selection has `score`"),
        (["url", "url"], "has `url` already, or it is named twice"),
    ],
)
@pytest.mark.parametrize(("name", "verb"), [("a.parquet", "run"), ("a.jsonl", "plan")])
def test_refused_before_anything_is_read(tmp_path, untrained, reports, columns, said, name, verb):
    (tmp_path / "pool").mkdir()
    table = pa.Table.from_pylist(documents(5))
    if name == "a.parquet":
        pq.write_table(table, tmp_path / "pool" / name)
    else:
        lines = "".join(json.dumps(row) + "\n" for row in table.to_pylist())
        (tmp_path / "pool" / name).write_text(lines)
    write(tmp_path / "target" / "t.parquet", rows(2, 30, ["sea"], prefix="t"))
    pool = {"path": str(tmp_path / "pool"), "keep_columns": columns}
    code, found = reports(verb, write_spec(tmp_path, **untrained, pool=pool))
    assert code == 2
    assert "keep_columns" in found["error"] and said in found["error"]
    assert not (tmp_path / "store" / "scans").exists()
