"""The counting of attempts, on the actor's class itself (Ray only says which nodes are alive)."""

import pytest
import ray

from stillhouse.actors.attempts import Attempts


@pytest.fixture
def attempts(ray_cluster):
    """A counter with a budget of two, and the name of the node that is alive."""
    counter = Attempts.remote(2)
    yield lambda name, *a: ray.get(getattr(counter, name).remote(*a)), ray.nodes()[0]["NodeID"]
    ray.kill(counter)


def test_a_part_that_is_finished_starts_again_at_will(attempts):
    call, node = attempts
    for before in range(5):
        assert call("begin", "p", node) == (before, None)
        call("finish", "p")
    assert call("retries") == {"program": 0, "hardware": 0}


def test_a_part_that_never_ends_is_given_up(attempts):
    call, node = attempts
    assert call("begin", "p", node) == (0, None)
    assert call("begin", "p", node) == (1, None)
    assert call("begin", "p", node)[1] == "killed its worker 2 times"
    assert call("begin", "other", node) == (0, None)


def test_lost_nodes_count_apart(attempts):
    call, node = attempts
    for before in range(10):
        assert call("begin", "p", "a node that is gone") == (before, None)
    assert call("begin", "p", node) == (10, None)
    assert call("retries") == {"program": 0, "hardware": 10}
