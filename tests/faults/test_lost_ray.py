"""A driver, its Ray or the head killed: a line, exit code 4, and a record that says so."""

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from drivers import KEYS, PATIENCE_S, STILLHOUSE, KillAt, descendants
from fault_proxy import FaultProxy
from heads import TOKEN, clean_environment, free_ports, kill_all, processes_of, running_head
from small import small_spec

from stillhouse.storage.run_record import LEASE_S, read_status


def command_of(pid):
    """Its command line; empty where it ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return [""]


def raylets(pid):
    """Ids of the raylets among what descends from a process."""
    return [child for child in descendants(pid) if command_of(child)[0].endswith("/raylet")]


def has_ended(pid, timeout_s=PATIENCE_S):
    """Wait for the end of a process that is no child of ours."""
    try:
        watched = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    ended, _, _ = select.select([watched], [], [], timeout_s)
    os.close(watched)
    return bool(ended)


@pytest.mark.soak
def test_a_lost_local_ray_ends_the_run_with_a_word(bench):
    store, started = f"s3://{bench.bucket()}/store", []

    def kill():
        kill_all(raylets(started[0].process.pid))

    rule = KillAt("/scores/parts/", 0, "reset", kill)
    with FaultProxy(bench.s3_server, rule) as proxy:
        started.append(bench.start(store, endpoint=proxy.url))
        code, found, errors = started[0].end()
    assert rule.killed
    assert (code, found["status"]) == (4, "error"), errors
    assert "Ray on this machine, died: run the same command again to go on" in errors
    (record,) = statuses(bench, store)
    assert (record["state"], "Ray ended the driver" in record["error"]) == ("stopped", True)
    code, _, errors = bench.start(store).end()
    assert code == 0, errors
    (record,) = statuses(bench, store)
    assert [record["state"], *(one["state"] for one in record["earlier"])] == ["done", "stopped"]


def statuses(bench, store):
    """What the records of a bucket's runs say."""
    bucket = store.removeprefix("s3://").partition("/")[0]
    found = bench.objects(bucket)
    return [json.loads(data) for key, data in found.items() if key.endswith("/status.json")]


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.soak)]
)
def test_a_driver_that_is_stopped_or_killed(shared_bench, number):
    """In both cases nothing of it lives on; a killed one can only be missed."""
    bench = shared_bench
    store, started, drivers = f"s3://{bench.bucket()}/store", [], []

    def kill():
        drivers.extend(descendants(started[0].process.pid))
        started[0].process.send_signal(number)

    rule = KillAt("/selections/manifest", 0, "reset", kill)
    with FaultProxy(bench.s3_server, rule) as proxy:
        started.append(bench.start(store, endpoint=proxy.url))
        code = started[0].process.wait(PATIENCE_S)
    assert rule.killed
    assert all(has_ended(pid) for pid in drivers)
    (record,) = statuses(bench, store)
    if number == signal.SIGKILL:
        assert (code, record["state"]) == (-signal.SIGKILL, "running")
        heard = read_status_of(bench, store)
        assert heard == ("lost", "running")
    else:
        errors = (started[0].folder / "stderr").read_text()
        assert (code, record["state"], record["error"]) == (4, "stopped", "stopped by a signal")
        assert "stopped; run the same command again to go on" in errors


def read_status_of(bench, store):
    """What `status` says of the bucket's run a lease after it was heard of last, and before."""
    from datetime import datetime

    from stillhouse.storage.filesystem import use_options

    use_options(store, {"endpoint_url": bench.s3_server})
    (record,) = statuses(bench, store)
    heard = datetime.fromisoformat(record["updated"]).timestamp()
    run = f"{store}/runs/{record['run']}"
    return tuple(read_status(run, heard + age)["state"] for age in (LEASE_S + 1, LEASE_S - 1))


@pytest.mark.soak
@pytest.mark.parametrize("submitted", [True, False])
def test_a_head_that_dies_takes_no_driver_with_it_in_silence(
    job, bench, s3_server, tmp_path, submitted
):
    """Only the head's own processes are killed: the driver has to notice."""
    store, ports = f"s3://{bench.bucket()}/store", free_ports(5)
    options = {"endpoint_url": s3_server}
    environment = clean_environment(tmp_path) | KEYS | {"AWS_ENDPOINT_URL": s3_server}
    environment |= {"RAY_AUTH_TOKEN": TOKEN}
    started = {}
    with running_head(environment, tmp_path / "head.log", ports) as head:

        def kill():
            mine = processes_of(head.process.pid)
            started["drivers"] = [p for p in mine if "stillhouse.jobs.cli" in command_of(p)]
            kill_all(pid for pid in mine if pid not in started["drivers"])

        rule = KillAt("/scores/parts/", 0, "reset", kill)
        with FaultProxy(s3_server, rule) as proxy:
            options = {"endpoint_url": proxy.url}
            spec = small_spec(job.folder, **job.models, store=store, storage_options=options)
            path = tmp_path / "spec.json"
            path.write_text(json.dumps(spec))
            where = {"RAY_ADDRESS": head.url if submitted else f"127.0.0.1:{ports[0]}"}
            verb = ["submit", str(path), "--follow"] if submitted else ["run", str(path)]
            done = subprocess.run(
                [STILLHOUSE, *verb, "--json"],
                env=environment | where,
                capture_output=True,
                text=True,
                timeout=PATIENCE_S,
            )
            assert rule.killed
            assert len(started["drivers"]) == 2 * submitted
            assert all(has_ended(pid) for pid in started["drivers"])
    assert (done.returncode, "run the same command again" in done.stderr) == (4, True), done.stderr
    (record,) = statuses(bench, store)
    assert record["state"] == "stopped"


def test_a_dead_raylet_is_noticed_where_ray_waits(tmp_path):
    script = """
import os, signal, sys, time
import ray
from ray._private import worker
from stillhouse.jobs.cluster import died_here
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
print(died_here(), flush=True)
[raylet] = worker._global_node.all_processes["raylet"]
os.kill(raylet.process.pid, signal.SIGKILL)
until = time.time() + 60
while died_here() is None and time.time() < until:
    time.sleep(0.01)
print(died_here(), flush=True)
os._exit(0)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=clean_environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    first, *_, last = done.stdout.splitlines()
    assert (first, last) == ("None", "Ray's raylet on this machine has died"), done.stderr
