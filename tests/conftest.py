"""What all tests share: libraries held to one thread each, and one real local Ray."""

import os
from collections.abc import Iterator

import pytest

# Before the first import of numpy, torch or tokenizers, and inherited by Ray's workers.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A real Ray of four CPUs for the whole session; started by the first test that asks."""
    import ray

    ray.init(
        address="local",  # whatever RAY_ADDRESS says
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=200_000_000,
        log_to_driver=False,
    )
    yield
    ray.shutdown()
