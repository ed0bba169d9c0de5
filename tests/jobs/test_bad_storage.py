"""What a store that cannot be used gets: one sentence, exit code 4, and a run that can go on."""

import json
import shutil
import socket
import subprocess

import pytest
import yaml
from small import about, small_spec

from stillhouse import open_selection
from stillhouse.errors import ArtifactError
from stillhouse.jobs.verify import verify
from stillhouse.storage.filesystem import use_options
from stillhouse.storage.sealed import FORMAT_VERSION


@pytest.fixture
def run(world, untrained, tmp_path, reports):
    """Runs the small job on a store: (exit code, the error)."""

    def call(store, **changes):
        spec = tmp_path / "spec.yaml"
        spec.write_text(yaml.safe_dump(small_spec(world, **untrained, store=store, **changes)))
        code, result = reports("run", str(spec))
        return code, result.get("error")

    return call


@pytest.fixture
def s3_options(s3_url, monkeypatch):
    """Sets fsspec's options of s3 for one test."""
    from fsspec.config import conf

    monkeypatch.setitem(conf, "s3", {})
    return lambda **options: use_options("s3://", options)


def test_no_access(run, bucket, proxied):
    proxied.rule = lambda *_: "403"
    options = {"endpoint_url": proxied.url}
    code, error = run(f"{bucket}/store", storage_options=options)
    assert code == 4
    assert error.endswith("(no access: check the credentials and the permissions of the path)")
    assert f"{bucket}/store/store.json" in error


def test_expired_credentials(run, bucket, proxied):
    proxied.rule = lambda *_: "expired"
    code, error = run(f"{bucket}/store", storage_options={"endpoint_url": proxied.url})
    assert code == 4
    assert "ExpiredToken" in error and "check the credentials" in error


def test_another_region(run, bucket, proxied):
    proxied.rule = lambda *_: "region"
    code, error = run(f"{bucket}/store", storage_options={"endpoint_url": proxied.url})
    assert code == 4
    assert "the bucket is in another region: set AWS_REGION" in error


def test_no_bucket(run, s3_options):
    s3_options()
    code, error = run("s3://no-such-bucket-here/store")
    assert code == 4
    assert "there is no such bucket: make it or give another `store`" in error


def test_nothing_listens(run, s3_options, monkeypatch):
    monkeypatch.setattr("stillhouse.storage.retries._PATIENCE_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    s3_options()
    endpoint = {"endpoint_url": f"http://127.0.0.1:{port}"}
    code, error = run("s3://bucket/store", storage_options=endpoint)
    assert code == 4
    assert "nothing answers there: check AWS_ENDPOINT_URL" in error


def test_a_secret_in_the_spec_is_refused_and_not_repeated(run):
    code, error = run("s3://bucket/store", storage_options={"secret": "do-not-repeat"})
    assert code == 2
    assert "`storage_options`" in error and "do-not-repeat" not in error


def test_a_password_in_a_url_is_refused_and_not_repeated(run):
    endpoint = {"endpoint_url": "http://user:do-not-repeat@host:9000"}
    for changes in (
        {"storage_options": endpoint},
        {"pool": {"path": ["a.jsonl", "https://host/a.jsonl?X-Amz-Signature=do-not-repeat"]}},
    ):
        code, error = run("s3://bucket/store", **changes)
        assert code == 2
        assert "holds a password or a signature" in error and "do-not-repeat" not in error
        assert "endpoint_url`" in error or "`pool.path`" in error


def test_a_store_that_is_a_file(run, tmp_path):
    (tmp_path / "store").write_text("")
    code, error = run(str(tmp_path / "store"))
    assert code == 4
    assert "is a file, not a folder: give another `store`" in error


def test_a_read_only_store(run, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    code, error = run(str(small_disk / "store"))
    assert code == 4
    assert "read-only: give another `store`" in error


@pytest.mark.soak
def test_a_full_disk_stops_the_run_and_a_larger_one_lets_it_go_on(ray_cluster, run, small_disk):
    def remount(size):
        subprocess.run(["mount", "-o", f"remount,size={size}", str(small_disk)], check=True)

    store = str(small_disk / "store")
    remount("400k")
    code, error = run(store)
    assert code == 4
    assert "disk full: free space and run again, finished parts are kept" in error
    remount("64m")
    assert run(store) == (0, None)
    [made] = (small_disk / "store" / "selections" / "about").glob("*/manifest.json")
    assert verify(str(small_disk / "store" / "selections" / made.parent.name), 8)["problems"] == []


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished job's selections, with what a reader of them needs."""
    folder = tmp_path / "copy"
    store = finished["run"].rsplit("/runs/", 1)[0]
    for kind in ("selections", "tokens"):
        shutil.copytree(f"{store}/{kind}", folder / kind)
    return folder


def verified(reports, uri):
    code, found = reports("verify", str(uri))
    return code, " | ".join(found["problems"])


def test_a_manifest_of_a_newer_version(copy, finished, reports):
    folder = copy / "selections" / finished["selection_fingerprint"]
    path = about(folder) / "manifest.json"
    content = json.loads(path.read_text())
    content["format_version"] = FORMAT_VERSION + 1
    path.write_text(json.dumps(content))
    code, error = verified(reports, folder)
    assert code == 3
    assert "was written by a newer Stillhouse" in error and "upgrade to read it" in error


def test_a_broken_manifest(copy, finished, reports):
    folder = copy / "selections" / finished["selection_fingerprint"]
    path = about(folder) / "manifest.json"
    path.write_bytes(b'{"kind": "selec')
    code, error = verified(reports, folder)
    assert code == 3
    assert f"{path} is broken: " in error


def test_another_kind_where_a_selection_is_expected(finished):
    with pytest.raises(ArtifactError, match="holds `tokens` where `selections` is needed"):
        open_selection(finished["artifacts"]["tokens"])
