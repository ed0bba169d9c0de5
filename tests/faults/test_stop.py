"""`stop` and `logs`: a driver in a process of its own is asked through the store, by its record."""

import json
import subprocess
import sys
import threading
import time

import pytest
from drivers import PATIENCE_S, STILLHOUSE
from small import make_world, write_spec

from stillhouse.errors import ArtifactError
from stillhouse.jobs.logs import event_line, show_logs
from stillhouse.jobs.stop import stop_run
from stillhouse.storage.artifact import Store
from stillhouse.storage.run_record import RunRecord, ask_to_stop, read_status, recorded

NAME = "0" * 64
DRIVER = """
import signal, sys, time
from stillhouse.storage import run_record
from stillhouse.storage.artifact import Store

signal.signal(signal.SIGINT, signal.default_int_handler)  # tests may run with it ignored
run_record._BEAT_S = 0.1
record = run_record.RunRecord(Store(sys.argv[1]), "0" * 64)
record.start("job: select", "select")
print("started", flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    record.finish("stopped", "stopped by a signal")
    sys.exit(4)
"""


@pytest.fixture
def driver(tmp_path):
    """A running driver, and the URI of its run."""
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "started\n"
    yield process, Store(str(tmp_path)).path("runs", NAME)
    process.kill()
    process.communicate()


def cli(*words):
    done = subprocess.run([STILLHOUSE, *words], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout


def test_a_run_is_stopped_from_elsewhere_and_goes_on(driver):
    process, run = driver
    code, printed = cli("stop", run, "--json")
    assert process.wait(30) == 4
    assert (code, json.loads(printed)) == (
        0,
        {"run": run, "job_id": None, "was": "running", "state": "stopped"},
    )
    status = read_status(run)
    assert (status["state"], status["error"]) == ("stopped", "stopped by `stillhouse stop`")
    assert not any("stop" in name for name in recorded(run))
    code, printed = cli("stop", run)
    assert (code, "is stopped: nothing to stop" in " ".join(printed.split())) == (0, True)
    again = RunRecord(Store(run.rsplit("/runs/", 1)[0]), NAME)
    again.start("job: select", "select")
    again._stop_if_asked()  # the request was for the first attempt: no interrupt here
    again.finish("done")
    assert (read_status(run)["state"], read_status(run)["attempt"]) == ("done", 2)


def test_what_happened_is_shown_to_its_end(driver):
    process, run = driver
    lines = []
    threading.Timer(1.0, ask_to_stop, [run, 1]).start()
    found = show_logs(run, None, None, follow=True, write=lines.append)
    assert process.wait(30) == 4
    kinds = [event["event"] for event in found["events"]]
    assert kinds == ["started", "asked to stop", "stopped"]
    assert lines == [event_line(event) + "\n" for event in found["events"]]
    assert lines[2].endswith(" stopped error=stopped by `stillhouse stop`\n")
    code, printed = cli("logs", run)
    assert (code, printed) == (0, "".join(lines))


def test_a_driver_that_does_not_answer_goes_on(tmp_path):
    record = RunRecord(Store(str(tmp_path)), NAME)
    record.start("job: select", "select")
    record._ended.set()  # nothing looks for requests
    found = stop_run(record.uri, None, None, 0.5)
    assert (found["was"], found["state"]) == ("running", "running")
    with pytest.raises(ArtifactError, match="is no run"):
        stop_run(str(tmp_path), None, None, 1)
    with pytest.raises(ArtifactError, match="is no run"):
        show_logs(str(tmp_path), None, None, follow=False, write=print)


def test_lines_of_events():
    event = {"time": "T", "attempt": "a", "event": "step", "loss": 0.123456789, "name": None}
    assert event_line(event | {"parts": [1, 2]}) == "T step loss=0.123457 parts=[1, 2]"
    assert event_line(event | {"message": "chosen"}) == "T step chosen"


@pytest.mark.soak
def test_a_training_is_stopped_and_the_same_command_ends_it(tmp_path):
    make_world(tmp_path, shards=1, per_shard=200)
    spec = write_spec(tmp_path)
    running = subprocess.Popen([STILLHOUSE, "run", spec], stderr=subprocess.PIPE, text=True)
    runs = tmp_path / "store" / "runs"
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        found = [*runs.glob("*")] if runs.exists() else []
        status = read_status(str(found[0])) if found else None
        if status and any(name.startswith("train") for name in status["steps"]):
            break
        time.sleep(0.5)
    code, printed = cli("stop", str(found[0]), "--json")
    assert (code, json.loads(printed)["state"]) == (0, "stopped")
    running.communicate(timeout=60)
    assert running.returncode == 4
    done = subprocess.run([STILLHOUSE, "run", spec, "--json"], capture_output=True, text=True)
    assert (done.returncode, json.loads(done.stdout)["status"]) == (0, "done")
