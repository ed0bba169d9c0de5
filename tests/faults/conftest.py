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
def expected(job, s3_server, ray_cluster):
    """What a run that nothing disturbs leaves in a local store: sha256 by path."""
    bench = Bench(job, s3_server, job.folder / "undisturbed", ray_cluster)
    store = str(bench.folder / "store")
    code, _, errors = bench.start(store).end()
    bench.close()
    assert code == 0, errors
    return bench.contents(store)


@pytest.fixture
def bench(job, s3_server, tmp_path):
    """Starts drivers of the job with a Ray of their own; kills those that a test leaves behind."""
    made = Bench(job, s3_server, tmp_path)
    yield made
    made.close()


@pytest.fixture
def shared_bench(job, s3_server, tmp_path, ray_cluster):
    """The same on the session's Ray, which outlives them: a driver is up in a moment."""
    made = Bench(job, s3_server, tmp_path, ray_cluster)
    yield made
    made.close()
