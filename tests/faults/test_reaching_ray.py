"""`run` reaches Ray, or says in a line why not: tokens, addresses, a folder of a long name."""

import json
import socket
import subprocess

import pytest
from drivers import PATIENCE_S, STILLHOUSE
from heads import TOKEN, clean_environment, free_ports, running_head
from small import make_models, make_world, write_spec

from stillhouse.errors import ClusterError
from stillhouse.jobs.cluster import head_at, silence_of


@pytest.fixture
def home(tmp_path):
    """A small world in a home of its own, in which Ray was never started."""
    make_world(tmp_path, shards=1, per_shard=60)
    return tmp_path


def run(spec, environment, *sets):
    """Exit code and what `run --json` printed."""
    options = [word for one in sets for word in ("--set", one)]
    done = subprocess.run(
        [STILLHOUSE, "run", spec, "--json", *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    return done.returncode, json.loads(done.stdout), done.stderr


def test_a_cluster_that_is_started_after_a_local_run(home):
    """The local run leaves a token in the home, with which `ray start` protects the cluster.

    The first run is in a temporary folder whose path no socket can have.
    """
    (home / "models").mkdir()
    spec = write_spec(home, **make_models(home / "models"))
    environment = clean_environment(home)
    folder = home / ("a-long-name-as-batch-systems-give-" * 3)
    folder.mkdir()
    code, found, said = run(spec, environment | {"TMPDIR": str(folder)})
    assert (code, found["status"]) == (0, "done"), said
    assert (home / ".ray" / "auth_token").exists()

    ports = free_ports(5)
    address = f"127.0.0.1:{ports[0]}"
    with running_head(environment, home / "head.log", ports, secret=None):
        there = environment | {"RAY_ADDRESS": address}
        code, found, said = run(spec, there, "selection.tau=5")
        assert (code, found["status"]) == (0, "done"), said
        other = there | {"HOME": str(home / "models")}
        code, found, _ = run(spec, other, "selection.tau=6")
        assert (code, "wants a token and there is none here" in found["error"]) == (2, True)
        code, found, said = run(spec, other | {"RAY_AUTH_TOKEN": TOKEN}, "selection.tau=6")
        assert (code, "refuses the token from RAY_AUTH_TOKEN" in found["error"]) == (2, True)
        assert TOKEN not in said
        code, found, _ = run(spec, there | {"RAY_AUTH_MODE": "disabled"}, "selection.tau=6")
        assert (code, "RAY_AUTH_MODE=disabled keeps back" in found["error"]) == (2, True)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("ray://127.0.0.1:10001", "cannot use the Ray address 'ray://127.0.0.1:10001'"),
        ("http://127.0.0.1:8265", "use `stillhouse submit SPEC --address http://HOST:8265`"),
        ("no-port", "no Ray cluster at 'no-port'"),
        ("127.0.0.1:{free}", "no Ray cluster answers at 127.0.0.1:{free}"),
        ("127.0.0.1:{deaf}", "no Ray cluster answers at 127.0.0.1:{deaf}"),
    ],
)
def test_addresses_without_a_cluster(address, said):
    """Refused within seconds, where Ray by itself tries for minutes."""
    with socket.socket() as deaf, socket.socket() as free:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        free.bind(("127.0.0.1", 0))
        ports = {"deaf": deaf.getsockname()[1], "free": free.getsockname()[1]}
        with pytest.raises(ClusterError) as refused:
            head_at(address.format(**ports))
    assert said.format(**ports) in str(refused.value)


def test_a_head_that_went_away_is_noticed():
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))
        head.listen()
        address = f"127.0.0.1:{head.getsockname()[1]}"
        assert silence_of(address) is None
    assert f"the head of the cluster at {address} does not answer any more" in silence_of(address)
