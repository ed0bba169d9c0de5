"""A small job with given models, run by driver processes on an S3 server of these tests' own."""

import logging
import sys
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer

sys.path.insert(0, str(Path(__file__).parents[1] / "storage"))  # for fault_proxy

from drivers import Bench, Job, make_models


@pytest.fixture(scope="session")
def s3_server():
    """The endpoint of moto's S3 server over HTTP on loopback; no environment points to it."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="session")
def job(tmp_path_factory):
    """Pool, target and models on local disk: nothing is left to train."""
    from small import make_world

    folder = make_world(tmp_path_factory.mktemp("faults"), shards=2, per_shard=60)
    return Job(folder, make_models(folder))


@pytest.fixture(scope="session")
def expected(job, s3_server):
    """What a run that nothing disturbs leaves in a local store: sha256 by path."""
    bench = Bench(job, s3_server, job.folder / "undisturbed")
    store = str(bench.folder / "store")
    code, _, errors = bench.start(store).end()
    bench.close()
    assert code == 0, errors
    return bench.contents(store)


@pytest.fixture
def bench(job, s3_server, tmp_path):
    """Starts drivers of the job; kills those that a test leaves behind."""
    made = Bench(job, s3_server, tmp_path)
    yield made
    made.close()
