"""Short ids, the version, and output that nobody reads."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import stillhouse
from stillhouse.storage.artifact import Manifest, Store
from stillhouse.storage.commit import check_store
from stillhouse.storage.run_record import RunRecord

STILLHOUSE = str(Path(sys.executable).with_name("stillhouse"))
RUNS = ("abcdef12" + "0" * 56, "abcdef1f" + "1" * 56, "0a" * 32)
JOBS = ("c0ffee11" + "a" * 56 + "-1", "c0ffee11" + "a" * 56 + "-2", "dddddddd" + "b" * 56 + "-1")


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Three runs, each made by a job; the first run's job is one with a second attempt."""
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    store = Store(check_store(str(tmp_path / "store")))
    for run, job in ((RUNS[0], JOBS[0]), (RUNS[0], JOBS[1]), (RUNS[1], JOBS[2]), (RUNS[2], None)):
        record = RunRecord(store, run)
        record.start("job: select", "select", job, "nightly")
        record.finish("failed", "why")
    store.put_manifest(Manifest("selections", "0a0a0a0a" + "e" * 56, (), {}, {}))
    return store.uri


@pytest.mark.parametrize(
    ("typed", "run"), [("abcdef12", 0), ("abcdef120", 0), (RUNS[1], 1), ("0a0a0a0a", 2)]
)
def test_a_run_by_the_beginning_of_its_id(store, reports, typed, run):
    for where in (["--store", store], []):  # the default is ./store
        code, found = reports("status", typed, *where)
        assert (code, found["run"], found["name"]) == (0, RUNS[run], "nightly")


def test_a_job_by_the_beginning_of_its_id(store, reports):
    code, found = reports("status", "c0ffee11-2", "--store", store)
    assert (code, found["job_id"], "was" in found["run"]) == (0, JOBS[1], False)
    code, found = reports("status", "dddddddd", "--store", store)
    assert (code, found["job_id"], found["run"]["run"]) == (0, JOBS[2], RUNS[1])


@pytest.mark.parametrize("typed", ["c0ffee11-1", JOBS[0]])
def test_an_earlier_attempt_is_visible(store, reports, typed):
    code, found = reports("status", typed, "--store", store)
    assert (code, found["job_id"], found["run"]["attempt"]) == (0, JOBS[0], 2)
    assert (found["run"]["was"]["attempt"], found["run"]["was"]["error"]) == (1, "why")


def test_ambiguous_and_unknown(store, reports):
    code, found = reports("status", "abcdef1", "--store", store)
    assert code == 3  # seven characters are a path
    code, found = reports("status", "c0ffee11", "--store", store)
    assert code == 2
    assert found["error"] == f"'c0ffee11' may be any of {JOBS[0]}, {JOBS[1]}: give more characters"
    code, found = reports("verify", "0a0a0a0a", "--store", store)
    assert code == 2
    assert f"any of runs/{RUNS[2]}, selections/0a0a0a0a{'e' * 56}: give more" in found["error"]
    for verb in ("status", "report", "verify"):
        code, found = reports(verb, "fedcba98", "--store", store)
        assert (code, "begins with 'fedcba98': give `--store`" in found["error"]) == (2, True)


def test_other_verbs(store, reports):
    code, found = reports("report", "abcdef12", "--store", store)
    assert (code, f"runs/{RUNS[0]} has no report yet" in found["error"]) == (3, True)
    code, found = reports("publish", "books", "--to", "0a0a0a0aee", "--store", store)
    assert (code, found["selection"]) == (0, f"{store}/selections/0a0a0a0a{'e' * 56}")
    (Path(store).parent / "12345678").mkdir()
    code, found = reports("status", "12345678", "--store", store)
    assert (code, "neither a run nor a store" in found["error"]) == (3, True)


def test_version():
    found = subprocess.run([STILLHOUSE, "--version"], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, f"stillhouse {stillhouse.__version__}\n")


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_output_that_nobody_reads_is_no_error(store, options):
    """`| head` closes the pipe; this one is closed before a byte is written."""
    read, write = os.pipe()
    os.close(read)
    found = subprocess.run(
        [STILLHOUSE, "status", store, *options], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert (found.returncode, found.stderr) == (1, "")


def test_a_store_shows_names(store, capsys):
    from stillhouse.jobs.status import status_of
    from stillhouse.jobs.summary import show_status

    show_status(status_of(store))
    assert re.search(r"abcdef120000\s*│\s*nightly", capsys.readouterr().out)
