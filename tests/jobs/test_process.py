"""The process of a verb: what stdout holds, exit codes, and a driver that dies."""

import json
import os
import select
import signal
import subprocess
import sys
import threading

import pytest
import ray
import typer

from stillhouse.jobs.cluster import cluster
from stillhouse.jobs.process import VerbOutput, verb
from stillhouse.spec import ComputeSettings
from stillhouse.storage.artifact import Store
from stillhouse.storage.run_record import RunRecord, read_status


@ray.remote(max_retries=1)
def dies_once(marker):
    if not os.path.exists(marker):
        open(marker, "w").close()
        os._exit(1)


def test_what_ray_prints_of_a_lost_worker_goes_to_stderr(ray_cluster, tmp_path, capsys):
    """A thread of Ray's prints it, in a session that the caller opened."""
    errors = ""
    with cluster(ComputeSettings(), {}, num_actors=1):
        ray.get(dies_once.remote(str(tmp_path / "marker")))
        for _ in range(600):
            out, err = capsys.readouterr()
            assert out == ""
            errors += err
            if "(raylet)" in errors:
                break
            threading.Event().wait(0.1)
    assert "(raylet)" in errors


@pytest.mark.parametrize("as_json", [True, False])
def test_with_json_stdout_holds_one_object(capsys, as_json):
    @verb
    def command():
        other = threading.Thread(target=print, args=["from a thread"])
        other.start()
        other.join()
        return VerbOutput({"status": "done"}, print, 3)

    with pytest.raises(typer.Exit) as ended:
        command(as_json=as_json, debug=False)
    assert ended.value.exit_code == 3
    out, err = capsys.readouterr()
    if as_json:
        assert (json.loads(out), err) == ({"status": "done"}, "from a thread\n")
    else:
        assert (out, err) == ("from a thread\n{'status': 'done'}\n", "")


CHILD = """
import os, signal, sys
from stillhouse.jobs import process

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored after `nohup`
process.supervise()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGHUP])
process.tell_parent(run=sys.argv[1], store=sys.argv[2], options={})
print(os.getpid(), flush=True)
how = sys.stdin.readline().strip()
if how == "exit":
    process.tell_parent(ended=3)
    sys.exit(3)
if how == "signals":
    print(signal.sigwait([signal.SIGTERM, signal.SIGHUP]).name, flush=True)
    print(signal.sigwait([signal.SIGHUP]).name, signal.sigpending(), flush=True)
os._exit(1)  # as Ray does
"""


@pytest.fixture
def driver(tmp_path):
    """A process under supervision, the id of its child, and the URI of its run."""
    record = RunRecord(Store(str(tmp_path)), "0" * 64)
    record.start("job: select", "select")
    record._ended.set()  # the process of the driver renews no more
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, record.uri, str(tmp_path), "--json"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    yield process, int(process.stdout.readline()), record.uri
    process.kill()
    process.communicate()


def end(process, how=None):
    out, errors = process.communicate(None if how is None else how + "\n", timeout=60)
    return process.returncode, out, errors


def test_the_parent_exits_as_its_child(driver):
    process, _, run = driver
    assert end(process, "exit") == (3, "", "")
    assert read_status(run)["state"] == "running"


def test_a_driver_that_ray_ended_is_stopped(driver):
    process, _, run = driver
    code, out, errors = end(process, "by Ray")
    assert (code, json.loads(out)["status"]) == (4, "error")
    assert errors.startswith("error: Ray ended the driver: the cluster's head, or Ray on this ma")
    assert "run the same command again to go on" in errors
    found = read_status(run)
    assert (found["state"], "Ray ended the driver" in found["error"]) == ("stopped", True)


def test_a_killed_driver_is_stopped(driver):
    process, child, run = driver
    os.kill(child, signal.SIGKILL)
    code, _, errors = end(process)
    assert (code, "was killed (SIGKILL: out of memory?)" in errors) == (4, True)
    assert read_status(run)["state"] == "stopped"


def test_a_signal_that_comes_twice_is_passed_on_once(driver):
    """`timeout` signals its child and their group; a second one would break the clean-up."""
    process = driver[0]
    process.stdin.write("signals\n")
    process.stdin.flush()
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "SIGTERM\n"
    process.send_signal(signal.SIGHUP)
    code, out, errors = end(process)
    assert (code, out.splitlines()[0]) == (4, "SIGHUP set()")
    assert "the driver was stopped by SIGTERM" in errors


def test_a_driver_dies_with_its_parent(driver):
    process, child, _ = driver
    watched = os.pidfd_open(child)
    process.kill()
    assert select.select([watched], [], [], 60)[0]
    os.close(watched)
