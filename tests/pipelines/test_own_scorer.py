"""A job by a scorer that is not ours: scikit-learn on hashed n-grams, in examples/."""

from pathlib import Path

import pytest
from small import Quiet, make_world, parse, write_shard

import stillhouse
from stillhouse.jobs.plan import plan_job
from stillhouse.jobs.run import run_job
from stillhouse.jobs.verify import verify
from stillhouse.storage.filesystem import read_bytes

SCORER = {"import": "hashed_ngrams:HashedNgrams", "settings": {"ngram": 3}, "num_tokens": 8000}


@pytest.fixture
def own(monkeypatch, tmp_path, untrained, ray_cluster):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    make_world(tmp_path, shards=2, per_shard=60)

    def spec(**changes):
        asked = {"tokenizer": untrained["tokenizer"], "scorer": SCORER, **changes}
        given = parse(tmp_path).model_dump(mode="json", exclude={"prior", "conditional"})
        return type(parse(tmp_path)).model_validate(given | asked)

    return spec


def test_it_selects_and_new_shards_cost_only_themselves(own, tmp_path):
    first = run_job(own(), Quiet())
    sources = first["selection"]["sources"]
    assert sources["sea"]["kept_tokens"] > 0.9 * first["selection"]["num_tokens"]
    assert first["artifacts"]["prior"] is None
    assert first["work"]["fit scorer"] == {"parts": 1, "reused": 0}
    assert run_job(own(), Quiet())["status"] == "nothing_to_do"
    plan = plan_job(own())["steps"]
    assert plan["score"]["reused"] == plan["score"]["parts"] == first["work"]["score"]["parts"]

    selection = stillhouse.open_selection(first["run"])
    table = selection.to_arrow().read_all()
    assert "prior_nll" not in table.column_names
    assert table["score"].to_numpy().min() == pytest.approx(selection.threshold)
    page = read_bytes(first["report"]).decode()
    assert "hashed_ngrams:HashedNgrams" in page
    assert "CoLoR" not in page
    assert verify(first["run"], 4)["problems"] == []

    write_shard(tmp_path, 2, 60)
    second = run_job(own(), Quiet())
    assert second["work"]["fit scorer"] == {"parts": 1, "reused": 1}
    assert second["work"]["score"]["reused"] == first["work"]["score"]["parts"]


def test_it_selects_documents(own):
    changes = {"selection": {"fraction": 0.2, "grain": "documents"}}
    found = run_job(own(**changes), Quiet())
    kept = stillhouse.open_selection(found["run"]).to_arrow().read_all()
    assert kept["source"].to_pylist() == ["sea"] * kept.num_rows
    assert verify(found["run"], 0)["problems"] == []
