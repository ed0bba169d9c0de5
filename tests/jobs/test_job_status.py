"""A submitted job looked up by its id: in its store alone (with a cluster: tests/faults)."""

import pytest

from stillhouse.jobs.job_status import first_error, run_of
from stillhouse.storage.artifact import Store
from stillhouse.storage.run_record import RunRecord

JOB = f"{'a' * 64}-2"


@pytest.fixture
def failed(tmp_path, monkeypatch):
    """A store whose second run was made by JOB and failed."""
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    store = Store(str(tmp_path / "store"))
    RunRecord(store, "1" * 64).start("job: select", "select")
    record = RunRecord(store, "2" * 64)
    record.start("job: select", "select", JOB)
    record.step("score prior", parts=3, done=1, reused=0)
    place = {"step": "score prior", "part": "b" * 64, "node": "10.0.0.7"}
    record.finish("failed", "part killed its worker 3 times", place)
    return store.uri


def test_from_the_store(failed, reports):
    code, found = reports("status", JOB, "--store", failed)
    assert (code, found["cluster"]) == (0, None)
    assert (found["run"]["state"], found["run"]["submission"]) == ("failed", JOB)
    assert found["run"]["failed_at"]["node"] == "10.0.0.7"


def test_following_a_job_is_following_its_run(failed, reports):
    code, found = reports("status", JOB, "--follow", "--store", failed)
    assert (code, found["run"]["state"]) == (0, "failed")


def test_what_a_person_sees_of_a_failure(failed, capsys):
    from stillhouse.jobs.summary import show_job

    show_job({"job_id": JOB, "cluster": None, "why_not": "gone", "run": run_of(failed, JOB)})
    said = " ".join(capsys.readouterr().out.split())
    part = "b" * 64
    assert "gone; from its store:" in said
    assert f"step score prior, part {part}, node 10.0.0.7: part killed its worker 3 times" in said


def test_of_another_store_and_of_no_cluster(failed, reports):
    code, found = reports("status", f"{'a' * 64}-3", "--store", failed)
    assert (code, "no run in" in found["error"]) == (3, True)
    code, found = reports("status", JOB)
    assert (code, "give --address" in found["error"]) == (2, True)


@pytest.mark.parametrize(
    ("output", "line"),
    [
        ("scan: 3 parts\nerror: no files match\nerror: later", "no files match"),
        (
            'x\nTraceback (most recent):\n  File "a", line 1\nKeyError: 3\nmore',
            "KeyError: 3",
        ),
        ("all went well", None),
    ],
)
def test_first_line_that_matters(output, line):
    assert first_error(output) == line
