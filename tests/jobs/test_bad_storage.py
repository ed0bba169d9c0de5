"""What a store that cannot be used gets, and a training that fails: one sentence, exit code 4."""

import json
import shutil
import socket
import subprocess

import pytest
import ray
import yaml
from small import LEARNING, MODEL, about, small_spec

from stillhouse import open_selection
from stillhouse.errors import ArtifactError
from stillhouse.jobs.verify import verify
from stillhouse.storage.filesystem import use_options
from stillhouse.storage.sealed import FORMAT_VERSION


@pytest.fixture
def run(world, tmp_path, reports, request):
    """Runs the small job on a store: (exit code, the error)."""

    def call(store, trained=False, **changes):
        models = {} if trained else request.getfixturevalue("untrained")
        spec = tmp_path / "spec.yaml"
        content = small_spec(world, store=str(store), **(models | changes))
        spec.write_text(yaml.safe_dump(content))
        code, result = reports("run", str(spec))
        return code, result.get("error")

    return call


@pytest.fixture
def s3_options(s3_url, monkeypatch):
    """Sets fsspec's options of s3 for one test."""
    from fsspec.config import conf

    monkeypatch.setitem(conf, "s3", {})
    return lambda **options: use_options("s3://", options)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("403", "(no access: check the credentials and the permissions of the path)"),
        ("expired", "check the credentials"),
        ("region", "the bucket is in another region: set AWS_REGION"),
    ],
)
def test_a_server_that_refuses(run, bucket, proxied, answer, expected):
    proxied.rule = lambda *_: answer
    code, error = run(f"{bucket}/store", storage_options={"endpoint_url": proxied.url})
    assert (code, expected in error, f"{bucket}/store/store.json" in error) == (4, True, True)


def test_no_bucket_and_no_server(run, s3_options, monkeypatch):
    s3_options()
    code, error = run("s3://no-such-bucket-here/store")
    assert code == 4
    assert "there is no such bucket: make it or give another `store`" in error
    monkeypatch.setattr("stillhouse.storage.retries._PATIENCE_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    s3_options()
    endpoint = {"endpoint_url": f"http://127.0.0.1:{port}"}
    code, error = run("s3://bucket/store", storage_options=endpoint)
    assert (code, "nothing answers there: check AWS_ENDPOINT_URL" in error) == (4, True)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"storage_options": {"secret": "do-not-repeat"}}, "`storage_options`"),
        (
            {"storage_options": {"endpoint_url": "http://user:do-not-repeat@host:9000"}},
            "holds a password or a signature",
        ),
        (
            {"pool": {"path": ["a.jsonl", "https://host/a.jsonl?X-Amz-Signature=do-not-repeat"]}},
            "`pool.path`",
        ),
    ],
)
def test_a_secret_in_a_spec_is_refused_and_not_repeated(run, changes, expected):
    code, error = run("s3://bucket/store", **changes)
    assert (code, expected in error, "do-not-repeat" in error) == (2, True, False)


def test_a_store_that_is_a_file_or_read_only(run, tmp_path, small_disk):
    (tmp_path / "store").write_text("")
    code, error = run(tmp_path / "store")
    assert (code, "is a file, not a folder: give another `store`" in error) == (4, True)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    code, error = run(small_disk / "store")
    assert (code, "read-only: give another `store`" in error) == (4, True)


def remount(disk, size):
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


@pytest.mark.soak
def test_a_full_disk_stops_the_run_and_a_larger_one_lets_it_go_on(ray_cluster, run, small_disk):
    store = small_disk / "store"
    remount(small_disk, "400k")
    code, error = run(store)
    assert code == 4
    assert "disk full: free space and run again, finished parts are kept" in error
    remount(small_disk, "64m")
    assert run(store) == (0, None)
    [made] = (store / "selections" / "about").glob("*/manifest.json")
    assert verify(str(store / "selections" / made.parent.name), 8)["problems"] == []


def test_a_disk_that_is_full_when_a_model_is_written(ray_cluster, run, small_disk):
    """Everything before fits into a megabyte; the model alone is larger."""
    remount(small_disk, "1m")
    large = {"hidden_size": 192, "num_layers": 1}
    prior = {"model": large, "num_tokens": 512, **LEARNING}
    code, error = run(small_disk / "store", trained=True, prior=prior)
    assert code == 4
    assert error.startswith("writing ") and ".safetensors failed" in error
    assert "disk full: free space and run again, finished parts are kept" in error


def test_a_training_that_diverges(ray_cluster, run, tmp_path):
    prior = {"model": MODEL, "num_tokens": 6000, "learning_rate": 1e30, "global_batch": 8}
    code, error = run(tmp_path / "store", trained=True, prior=prior)
    assert code == 4
    assert error.startswith("step ") and "at learning rate" in error
    assert "lower `learning_rate` or raise `warmup` (sources in the batch: code, food" in error
    node = ray.get_runtime_context().worker.node_ip_address
    [status] = (tmp_path / "store" / "runs").glob("*/status.json")
    failed_at = json.loads(status.read_text())["failed_at"]
    assert failed_at == {"step": "train prior", "part": "prior", "node": node}


def test_manifests_of_another_version_or_kind(finished, tmp_path, reports):
    store = finished["run"].rsplit("/runs/", 1)[0]
    for kind in ("selections", "tokens"):
        shutil.copytree(f"{store}/{kind}", tmp_path / kind)
    folder = tmp_path / "selections" / finished["selection_fingerprint"]
    path = about(folder) / "manifest.json"
    newer = json.loads(path.read_text()) | {"format_version": FORMAT_VERSION + 1}
    for content, expected in (
        (json.dumps(newer), "was written by a newer Stillhouse"),
        ('{"kind": "selec', f"{path} is broken: "),
    ):
        path.write_text(content)
        code, found = reports("verify", str(folder))
        assert (code, expected in " | ".join(found["problems"])) == (3, True)
    with pytest.raises(ArtifactError, match="holds `tokens` where `selections` is needed"):
        open_selection(finished["artifacts"]["tokens"])
