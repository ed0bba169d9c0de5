"""A run read from its store alone."""

from pathlib import Path

import pytest
from small import Quiet, parse

from jobs.run import run_job
from jobs.status import draw_report, status_of
from stillhouse.errors import ArtifactError, BudgetError


def test_of_a_run(finished):
    found = status_of(finished["run"])
    assert (found["job"], found["state"], found["error"]) == ("select", "done", None)
    assert found["events"] > 0
    assert all(step["state"] == "done" for step in found["steps"].values())
    scored = found["steps"]["score prior"]
    assert scored["done"] == scored["parts"] == finished["work"]["score prior"]["parts"]
    assert found["steps"]["train targets"]["done"] == pytest.approx(4)


def test_of_a_store(finished, reports):
    code, found = reports("status", finished["run"].rsplit("/", 2)[0])
    assert code == 0
    states = {run["run"]: run["state"] for run in found["runs"]}
    assert states[finished["run"].rsplit("/", 1)[1]] == "done"


def test_of_a_run_that_failed(finished, world):
    spec = parse(world, selection={"min_score": 50})
    with pytest.raises(BudgetError):
        run_job(spec, Quiet())
    store = finished["run"].rsplit("/", 2)[0]
    failed = [run for run in status_of(store)["runs"] if "threshold 50" in str(run.get("error"))]
    assert [run["state"] for run in failed] == ["failed"]
    with pytest.raises(ArtifactError, match="has no report yet"):
        draw_report(f"{store}/runs/{failed[0]['run']}")


def test_of_nothing(reports, tmp_path):
    code, found = reports("status", str(tmp_path))
    assert code == 3
    assert "neither a run nor a store" in found["error"]


def test_report_is_drawn_again(finished, reports):
    page = Path(finished["report"])
    before = page.read_bytes()
    page.unlink()
    assert reports("report", finished["run"]) == (0, {"report": str(page)})
    assert page.read_bytes() == before
    assert b"http://" not in before.replace(b"http://www.w3.org", b"")
