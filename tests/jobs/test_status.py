"""Runs, stores and submitted jobs, read from a store alone (with a cluster: tests/faults)."""

import json
import os
import re
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from small import Quiet, parse

import stillhouse
from stillhouse.errors import ArtifactError, BudgetError
from stillhouse.jobs.run import run_job
from stillhouse.jobs.status import draw_report, first_error, follow, run_of, status_of
from stillhouse.jobs.summary import show_job, show_status
from stillhouse.storage import run_record
from stillhouse.storage.artifact import Manifest, Store
from stillhouse.storage.commit import check_store
from stillhouse.storage.run_record import RunRecord, read_status

STILLHOUSE = str(Path(sys.executable).with_name("stillhouse"))
RUNS = ("abcdef12" + "0" * 56, "abcdef1f" + "1" * 56, "0a" * 32)
JOBS = ("c0ffee11" + "a" * 56 + "-1", "c0ffee11" + "a" * 56 + "-2", "dddddddd" + "b" * 56 + "-1")


def test_a_finished_run_its_store_and_its_report(finished, reports):
    found = status_of(finished["run"])
    assert (found["job"], found["state"], found["error"]) == ("select", "done", None)
    assert found["events"] > 0
    assert all(step["state"] == "done" for step in found["steps"].values())
    scored = found["steps"]["score prior"]
    assert scored["done"] == scored["parts"] == finished["work"]["score prior"]["parts"]
    assert found["steps"]["train targets"]["done"] == pytest.approx(4)

    store, run = finished["run"].rsplit("/runs/", 1)
    code, found = reports("status", store)
    assert (code, {row["run"]: row["state"] for row in found["runs"]}[run]) == (0, "done")
    by_name = {row["fingerprint"]: row for row in found["artifacts"]}
    kept = by_name[finished["selection_fingerprint"]]
    assert (kept["kind"], f"runs/{run}" in kept["referred_by"]) == ("selections", True)
    rows = Path(finished["artifacts"]["selection"])
    files = [*rows.iterdir(), *(rows.parent / "about" / rows.name).iterdir()]
    assert kept["bytes"] == sum(path.stat().st_size for path in files)
    tokens = by_name[Path(finished["artifacts"]["tokens"]).name]
    assert f"selections/{finished['selection_fingerprint']}" in tokens["referred_by"]
    prior = by_name[Path(finished["artifacts"]["prior"]).name]
    assert any(label.startswith("pins/") for label in prior["referred_by"])

    page = Path(finished["report"])
    before = page.read_bytes()
    page.unlink()
    assert reports("report", finished["run"]) == (0, {"report": str(page)})
    assert page.read_bytes() == before
    assert b"http://" not in before.replace(b"http://www.w3.org", b"")


def test_a_run_that_failed(finished, world):
    with pytest.raises(BudgetError):
        run_job(parse(world, selection={"min_score": 50}), Quiet())
    store = finished["run"].rsplit("/", 2)[0]
    failed = [run for run in status_of(store)["runs"] if "threshold 50" in str(run.get("error"))]
    assert [run["state"] for run in failed] == ["failed"]
    with pytest.raises(ArtifactError, match="has no report yet"):
        draw_report(f"{store}/runs/{failed[0]['run']}")


def new_record(folder):
    record = RunRecord(Store(str(folder)), "0" * 64)
    record.start("job: select\n", "select")
    return record


def test_following_shows_what_changes_to_the_end(tmp_path):
    record, waited = new_record(tmp_path), []

    def work(seconds):
        """What a run does while its follower waits."""
        if len(waited) == 0:
            record.step("scan", state="running", parts=2, done=1)
            record.flush()
        elif len(waited) == 2:
            record.finish("done")
        waited.append(seconds)

    shown = [(found["state"], changed) for found, changed in follow(record.uri, work)]
    assert shown == [("running", []), ("running", ["scan"]), ("done", [])]
    assert len(waited) == 3
    with pytest.raises(ArtifactError, match="not a run"):
        next(follow(str(tmp_path)))


def test_a_driver_that_was_not_heard_of_is_lost(tmp_path, reports):
    record = new_record(tmp_path)
    page = Path(record.uri) / "status.json"
    heard = datetime.fromisoformat(json.loads(page.read_text())["updated"]).timestamp()
    states = [read_status(record.uri, heard + age)["state"] for age in (-30, 0, 59, 61, 1e9)]
    assert states == ["running", "running", "running", "lost", "lost"]
    record.finish("done")
    assert read_status(record.uri, heard + 1e9)["state"] == "done"
    old = json.loads(page.read_text()) | {"state": "running"}
    old["updated"] = (datetime.now(UTC) - timedelta(seconds=90)).isoformat(timespec="seconds")
    page.write_text(json.dumps(old))
    code, found = reports("status", record.uri, "--follow")
    assert (code, found["state"]) == (0, "lost")
    assert reports("status", str(tmp_path))[1]["runs"][0]["state"] == "lost"


def test_attempts_are_counted_and_the_earlier_ones_kept(tmp_path):
    for end in ("failed", None, "done"):  # the second one ends silently
        record = new_record(tmp_path)
        if end is not None:
            record.finish(end, {"failed": "why"}.get(end))
    found = read_status(record.uri)
    assert (found["attempt"], found["state"]) == (3, "done")
    earlier = [(one["attempt"], one["state"], one["error"]) for one in found["earlier"]]
    assert earlier == [(1, "failed", "why"), (2, "lost", None)]


def test_a_live_run_renews_its_lease_between_events(tmp_path, monkeypatch):
    written = threading.Event()
    put = run_record._put_status
    monkeypatch.setattr(run_record, "_BEAT_S", 0.01)
    monkeypatch.setattr(run_record, "_FLUSH_S", 0.0)
    record = new_record(tmp_path)

    def seen(uri, status):
        put(uri, status)
        written.set()

    monkeypatch.setattr(run_record, "_put_status", seen)
    assert written.wait(60)
    record.finish("done")
    assert read_status(record.uri)["state"] == "done"


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Three runs, each made by a job; the first run's job has a second attempt."""
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    store = Store(check_store(str(tmp_path / "store")))
    failed_at = {"step": "score prior", "part": "b" * 64, "node": "10.0.0.7"}
    for run, job in ((RUNS[0], JOBS[0]), (RUNS[0], JOBS[1]), (RUNS[1], JOBS[2]), (RUNS[2], None)):
        record = RunRecord(store, run)
        record.start("job: select", "select", job, "nightly")
        record.finish("failed", "why", failed_at)
    store.put_manifest(Manifest("selections", "0a0a0a0a" + "e" * 56, (), {}, {}))
    return store.uri


@pytest.mark.parametrize(
    ("typed", "run"), [("abcdef12", 0), ("abcdef120", 0), (RUNS[1], 1), ("0a0a0a0a", 2)]
)
def test_a_run_by_the_beginning_of_its_id(store, reports, typed, run):
    for where in (["--store", store], []):  # the default is ./store
        code, found = reports("status", typed, *where)
        assert (code, found["run"], found["name"]) == (0, RUNS[run], "nightly")


@pytest.mark.parametrize(
    ("typed", "job", "run", "attempt", "was"),
    [
        ("c0ffee11-2", 1, 0, 2, None),
        ("dddddddd", 2, 1, 1, None),
        ("c0ffee11-1", 0, 0, 2, 1),  # an earlier attempt at the run
        (JOBS[0], 0, 0, 2, 1),
    ],
)
def test_a_job_by_the_beginning_of_its_id(store, reports, typed, job, run, attempt, was):
    for options in ([], ["--follow"]):
        code, found = reports("status", typed, "--store", store, *options)
        assert (code, found["job_id"], found["cluster"]) == (0, JOBS[job], None)
        assert (found["run"]["run"], found["run"]["attempt"]) == (RUNS[run], attempt)
        assert found["run"].get("was", {}).get("attempt") == was
    assert found["run"]["failed_at"]["node"] == "10.0.0.7"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["status", "abcdef1"], 3, "neither a run nor a store"),  # seven characters are a path
        (["status", "12345678"], 3, "neither a run nor a store"),  # a folder with such a name
        (["status", "c0ffee11"], 2, f"may be any of {JOBS[0]}, {JOBS[1]}: give more characters"),
        (["verify", "0a0a0a0a"], 2, f"runs/{RUNS[2]}, selections/0a0a0a0a{'e' * 56}: give more"),
        (["status", "fedcba98"], 2, "begins with 'fedcba98': give `--store`"),
        (["report", "fedcba98"], 2, "begins with 'fedcba98': give `--store`"),
        (["verify", "fedcba98"], 2, "begins with 'fedcba98': give `--store`"),
        (["report", "abcdef12"], 3, f"runs/{RUNS[0]} has no report yet"),
        (["status", f"{'a' * 64}-3"], 3, "no run in"),
    ],
)
def test_ids_that_name_nothing_or_several_things(store, reports, arguments, code, message):
    (Path(store).parent / "12345678").mkdir()
    found = reports(*arguments, "--store", store)
    assert (found[0], message in found[1]["error"]) == (code, True)


def test_a_job_without_a_cluster_and_a_store(store, reports):
    code, found = reports("status", JOBS[0])
    assert (code, "give --address" in found["error"]) == (2, True)


def test_what_a_person_sees(store, capsys):
    show_status(status_of(store))
    assert re.search(r"abcdef120000\s*│\s*nightly", capsys.readouterr().out)
    run = run_of(store, JOBS[2])
    show_job({"job_id": JOBS[2], "cluster": None, "why_not": "gone", "run": run})
    text = " ".join(capsys.readouterr().out.split())
    assert "gone; from its store:" in text
    assert f"step score prior, part {'b' * 64}, node 10.0.0.7: why" in text


@pytest.mark.parametrize(
    ("output", "line"),
    [
        ("scan: 3 parts\nerror: no files match\nerror: later", "no files match"),
        ('x\nTraceback (most recent):\n  File "a", line 1\nKeyError: 3\nmore', "KeyError: 3"),
        ("all went well", None),
    ],
)
def test_the_line_of_a_jobs_output_that_says_why(output, line):
    assert first_error(output) == line


def test_version():
    found = subprocess.run([STILLHOUSE, "--version"], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, f"stillhouse {stillhouse.__version__}\n")


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_closed_pipe_is_no_error(store, options):
    """As after `| head`; this one is closed before a byte is written."""
    read, write = os.pipe()
    os.close(read)
    found = subprocess.run(
        [STILLHOUSE, "status", store, *options], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert (found.returncode, found.stderr) == (1, "")
