"""A small job with given models, run by driver processes on an S3 server of these tests' own."""

import pytest
from drivers import Bench, Job


@pytest.fixture(scope="session")
def job(tmp_path_factory):
    """Pool, target and models on local disk: nothing is left to train."""
    from small import make_models, make_world

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
