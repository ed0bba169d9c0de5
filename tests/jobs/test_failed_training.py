"""A training that fails inside `job: select`: its own message, exit code 4, where it happened."""

import subprocess

import pytest
import ray
import yaml
from small import LEARNING, MODEL, small_spec

from stillhouse.storage.artifact import Store
from stillhouse.storage.filesystem import list_names
from stillhouse.storage.run_record import read_json


@pytest.fixture
def run(ray_cluster, world, tmp_path, reports):
    """Runs the small job with changes: (exit code, the error, where it stopped)."""

    def call(store, **changes):
        spec = tmp_path / "spec.yaml"
        spec.write_text(yaml.safe_dump(small_spec(world, store=str(store), **changes)))
        code, result = reports("run", str(spec))
        runs = Store(str(store)).path("runs")
        [status] = [read_json(f"{runs}/{name}", "status.json") for name in list_names(runs)]
        return code, result.get("error"), status["failed_at"]

    return call


def test_a_training_that_diverges(run, tmp_path):
    prior = {"model": MODEL, "num_tokens": 6000, "learning_rate": 1e30, "global_batch": 8}
    code, error, where = run(tmp_path / "store", prior=prior)
    assert code == 4
    assert error.startswith("step ") and "at learning rate" in error
    assert "lower `learning_rate` or raise `warmup` (sources in the batch: code, food" in error
    node = ray.get_runtime_context().worker.node_ip_address
    assert where == {"step": "train prior", "part": "prior", "node": node}


def test_a_disk_that_is_full_when_a_model_is_written(run, small_disk):
    """Everything before fits into a megabyte; the model alone is larger."""
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
    large = {"hidden_size": 192, "num_layers": 1}
    prior = {"model": large, "num_tokens": 512, **LEARNING}
    code, error, _ = run(small_disk / "store", prior=prior)
    assert code == 4
    assert error.startswith("writing ") and ".safetensors failed" in error
    assert "disk full: free space and run again, finished parts are kept" in error
