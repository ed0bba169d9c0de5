"""A driver's child process: what ends it is told, whoever ends it."""

import json
import os
import select
import signal
import subprocess
import sys

import pytest

from stillhouse.storage.artifact import Store
from stillhouse.storage.run_record import RunRecord, read_status

CHILD = """
import os, signal, sys
from stillhouse.jobs import supervised

supervised.supervise()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGHUP])
supervised.tell(run=sys.argv[1], store=sys.argv[2], options={})
print(os.getpid(), flush=True)
how = sys.stdin.readline().strip()
if how == "of itself":
    supervised.tell(ended=3)
    sys.exit(3)
if how == "signals":
    print(signal.sigwait([signal.SIGTERM, signal.SIGHUP]).name, flush=True)
    print(signal.sigwait([signal.SIGHUP]).name, signal.sigpending(), flush=True)
os._exit(1)  # as Ray does
"""


@pytest.fixture
def record(tmp_path):
    record = RunRecord(Store(str(tmp_path)), "0" * 64)
    record.start("job: select", "select")
    record._ended.set()  # the process of the driver renews no more
    return record


@pytest.fixture
def driver(record, tmp_path):
    """A process under supervision, and the id of its child."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, record.uri, str(tmp_path), "--json"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    yield process, int(process.stdout.readline())
    process.kill()
    process.communicate()


def told(process, how=None):
    out, errors = process.communicate(None if how is None else how + "\n", timeout=60)
    return process.returncode, out, errors


def test_its_own_exit_code(driver, record):
    assert told(driver[0], "of itself") == (3, "", "")
    assert read_status(record.uri)["state"] == "running"


def test_ended_by_ray(driver, record):
    code, out, errors = told(driver[0], "by Ray")
    assert (code, json.loads(out)["status"]) == (4, "error")
    assert errors.startswith("error: Ray ended the driver: the cluster's head, or Ray on this ma")
    assert "run the same command again to go on" in errors
    found = read_status(record.uri)
    assert (found["state"], "Ray ended the driver" in found["error"]) == ("stopped", True)


def test_killed(driver, record):
    os.kill(driver[1], signal.SIGKILL)
    code, _, errors = told(driver[0])
    assert (code, "was killed (SIGKILL: out of memory?)" in errors) == (4, True)
    assert read_status(record.uri)["state"] == "stopped"


def test_a_signal_that_comes_twice_is_passed_on_once(driver):
    """`timeout` sends to its child and to their group; a second one would break the clean-up."""
    process, _ = driver
    process.stdin.write("signals\n")
    process.stdin.flush()
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "SIGTERM\n"
    process.send_signal(signal.SIGHUP)
    code, out, errors = told(process)
    assert (code, out.splitlines()[0]) == (4, "SIGHUP set()")
    assert "the driver was stopped by SIGTERM" in errors


def test_dies_with_its_parent(driver):
    process, child = driver
    watched = os.pidfd_open(child)
    process.kill()
    assert select.select([watched], [], [], 60)[0]
    os.close(watched)
