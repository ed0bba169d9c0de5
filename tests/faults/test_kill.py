"""SIGKILL at every commit point, found from outside by a proxy in front of the S3 server.

The n-th PUT of a path is held while the driver is killed, and then either never reaches the server
(before the commit) or reaches it with no driver left to receive the answer (after it).
"""

import os
import random
import signal
from pathlib import Path

import pytest
from drivers import Bench, KillAt, descendants
from fault_proxy import FaultProxy

POINTS = {
    "before a part": ("/scores/parts/", 1, "reset"),
    "between a part and its receipt": ("/scores/receipts/", 1, "reset"),
    "before the manifest": ("/selections/manifest", 0, "reset"),
    "after the manifest": ("/selections/manifest", 0, "lose answer"),
}


def killed_at(bench, store, point):
    """Start the job and kill its driver at this point; the driver is dead on return."""
    wanted, number, then = POINTS[point]
    started = []
    rule = KillAt(wanted, number, then, lambda: started[0].kill())
    with FaultProxy(bench.s3_server, rule) as proxy:
        started.append(bench.start(store, endpoint=proxy.url))
        code = started[0].process.wait(280)
    assert rule.killed
    assert code == -signal.SIGKILL


def test_killed_at_every_commit_point_one_after_another(shared_bench, expected):
    """Each run is killed a step further on than the one before, the last one ends."""
    bench = shared_bench
    store = f"s3://{bench.bucket()}/store"
    for point in POINTS:
        killed_at(bench, store, point)
        found = bench.contents(store)
        assert found.items() < expected.items() or found == expected, point
    code, result, errors = bench.start(store).end()
    assert code == 0, errors
    assert all(work["parts"] == work["reused"] for work in result["work"].values())
    assert bench.contents(store) == expected
    assert bench.verify(result["run"])[0] == 0


def workers(driver, word):
    """Ids of the driver's Ray workers whose title has this word."""
    titles = {pid: Path(f"/proc/{pid}/cmdline") for pid in descendants(driver.process.pid)}
    read = {pid: path.read_text() for pid, path in titles.items() if path.exists()}
    # Ray's own agents live and die with their node
    mine = {pid: t for pid, t in read.items() if t.startswith("ray::") and "Agent" not in t}
    return [pid for pid, title in mine.items() if word in title]


@pytest.mark.soak
@pytest.mark.parametrize("word", ["PoolWorker", ""])
@pytest.mark.parametrize("point", ["before a part", "between a part and its receipt"])
def test_a_lost_worker_costs_the_part_it_held(bench, expected, point, word):
    """The job goes on by itself; PoolWorker is the one that scores, no word: all of them."""
    store = f"s3://{bench.bucket()}/store"
    wanted, number, then = POINTS[point]
    started, killed = [], []

    def kill():
        for pid in workers(started[0], word):
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    with FaultProxy(bench.s3_server, KillAt(wanted, number, then, kill)) as proxy:
        started.append(bench.start(store, endpoint=proxy.url))
        code, _, errors = started[0].end()
    assert killed
    assert code == 0, errors
    assert bench.contents(store) == expected


@pytest.fixture
def worker_nodes():
    """A Ray with two nodes for work beside its head: its address, the ids of their raylets."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=2) for _ in range(2)]
    yield cluster.address, [node.all_processes["raylet"][0].process.pid for node in nodes]
    cluster.shutdown()


def is_at_work(raylet):
    """Whether a worker of this node is in the middle of something."""
    titles = [Path(f"/proc/{pid}/cmdline").read_text() for pid in descendants(raylet)[1:]]
    return any(t.startswith("ray::") and "Agent" not in t and "IDLE" not in t for t in titles)


@pytest.mark.soak
@pytest.mark.parametrize("point", POINTS)
def test_a_lost_node_is_made_up_for_by_the_other(
    job, s3_server, tmp_path, worker_nodes, expected, point
):
    """SIGKILL of the raylet whose worker makes the request (of any one for the driver's own)."""
    address, raylets = worker_nodes
    bench = Bench(job, s3_server, tmp_path, address)
    store = f"s3://{bench.bucket()}/store"
    wanted, number, then = POINTS[point]

    def kill():
        busy = [raylet for raylet in raylets if is_at_work(raylet)]
        os.kill([*busy, *raylets][0], signal.SIGKILL)

    rule = KillAt(wanted, number, then, kill)
    with FaultProxy(bench.s3_server, rule) as proxy:
        code, _, errors = bench.start(store, endpoint=proxy.url).end()
    bench.close()
    assert rule.killed
    assert code == 0, errors
    assert bench.contents(store) == expected


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(20))
def test_killed_at_a_random_put(bench, expected, seed):
    store = f"s3://{bench.bucket()}/store"
    number, then = random.Random(seed).randrange(40), ("reset", "lose answer")[seed % 2]
    print(f"seed {seed}: the PUT {number}, {then}")
    started = []
    rule = KillAt("/", number, then, lambda: started[0].kill())
    with FaultProxy(bench.s3_server, rule) as proxy:
        started.append(bench.start(store, endpoint=proxy.url))
        started[0].process.wait(280)
    code, _, errors = bench.start(store).end()
    assert code == 0, errors
    assert bench.contents(store) == expected
