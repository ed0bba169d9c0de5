"""A run read from its store alone."""

import json
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from small import Quiet, parse

from stillhouse.errors import ArtifactError, BudgetError
from stillhouse.jobs.run import run_job
from stillhouse.jobs.status import draw_report, follow, status_of
from stillhouse.storage import run_record
from stillhouse.storage.artifact import Store
from stillhouse.storage.run_record import RunRecord, read_status


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


def test_artifacts_of_a_store_say_what_needs_them(finished, reports):
    store = finished["run"].rsplit("/", 2)[0]
    found = reports("status", store)[1]["artifacts"]
    by_name = {row["fingerprint"]: row for row in found}
    kept = by_name[finished["selection_fingerprint"]]
    run = "runs/" + finished["run"].rsplit("/", 1)[1]
    assert (kept["kind"], run in kept["referred_by"]) == ("selections", True)
    rows = Path(finished["artifacts"]["selection"])
    files = [
        path for folder in (rows, rows.parent / "about" / rows.name) for path in folder.iterdir()
    ]
    assert kept["bytes"] == sum(path.stat().st_size for path in files)
    tokens = by_name[Path(finished["artifacts"]["tokens"]).name]
    assert f"selections/{finished['selection_fingerprint']}" in tokens["referred_by"]
    prior = by_name[Path(finished["artifacts"]["prior"]).name]
    assert any(label.startswith("pins/") for label in prior["referred_by"])


def test_following_shows_what_changes_to_the_end(tmp_path):
    record = RunRecord(Store(str(tmp_path)), "0" * 64)
    record.start("job: select\n", "select")

    def work(seconds):
        """What a run does while its follower waits."""
        if len(waited) == 0:
            record.step("scan", state="running", parts=2, done=1)
            record.flush()
        elif len(waited) == 2:
            record.finish("done")
        waited.append(seconds)

    waited = []
    shown = [(found["state"], changed) for found, changed in follow(record.uri, work)]
    assert shown == [("running", []), ("running", ["scan"]), ("done", [])]
    assert len(waited) == 3


def test_a_store_cannot_be_followed(tmp_path):
    with pytest.raises(ArtifactError, match="not a run"):
        next(follow(str(tmp_path)))


def test_a_driver_that_says_nothing_any_more_is_lost(tmp_path, reports):
    record = RunRecord(Store(str(tmp_path)), "0" * 64)
    record.start("job: select\n", "select")
    page = Path(record.uri) / "status.json"
    heard = datetime.fromisoformat(json.loads(page.read_text())["updated"]).timestamp()
    states = [read_status(record.uri, heard + age)["state"] for age in (-30, 0, 59, 61, 1e9)]
    assert states == ["running", "running", "running", "lost", "lost"]
    record.finish("done")
    assert read_status(record.uri, heard + 1e9)["state"] == "done"

    old = json.loads(page.read_text()) | {"state": "running"}
    old["updated"] = (datetime.now(UTC) - timedelta(seconds=90)).isoformat(timespec="seconds")
    page.write_text(json.dumps(old))
    assert [state for state, _ in followed(record.uri)] == ["lost"]
    code, found = reports("status", record.uri, "--follow")
    assert (code, found["state"]) == (0, "lost")
    assert reports("status", str(tmp_path))[1]["runs"][0]["state"] == "lost"


def followed(uri):
    return [(found["state"], changed) for found, changed in follow(uri)]


def test_attempts_are_counted_and_the_earlier_ones_kept(tmp_path):
    for end in ("failed", None, "done"):  # the second says nothing at its end
        record = RunRecord(Store(str(tmp_path)), "0" * 64)
        record.start("job: select\n", "select")
        if end is not None:
            record.finish(end, {"failed": "why"}.get(end))
    found = read_status(record.uri)
    assert (found["attempt"], found["state"]) == (3, "done")
    earlier = [(one["attempt"], one["state"], one["error"]) for one in found["earlier"]]
    assert earlier == [(1, "failed", "why"), (2, "lost", None)]


def test_a_run_at_work_renews_its_lease_without_a_word(tmp_path, monkeypatch):
    """No step says anything: the thread does, until the end."""
    written = threading.Event()
    put = run_record._put_status
    monkeypatch.setattr(run_record, "_BEAT_S", 0.01)
    monkeypatch.setattr(run_record, "_FLUSH_S", 0.0)
    record = RunRecord(Store(str(tmp_path)), "0" * 64)
    record.start("job: select\n", "select")

    def seen(uri, status):
        put(uri, status)
        written.set()

    monkeypatch.setattr(run_record, "_put_status", seen)
    assert written.wait(60)
    record.finish("done")
    assert read_status(record.uri)["state"] == "done"
