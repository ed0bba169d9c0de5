"""A store on a server that nothing in the environment points to is found again by its URI."""

import json
from uuid import uuid4

import boto3
import pytest
from fsspec.config import conf
from selections import NUM_ROWS, put_selection

from stillhouse import open_selection
from stillhouse.storage.artifact import Store
from stillhouse.storage.commit import MARKER, create
from stillhouse.storage.filesystem import exists, known_options, remember_options


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """A separate home, and no endpoint in the environment."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(conf, "s3", {})


def test_readers_and_verbs_use_the_options_of_the_store(s3_server, reports):
    bucket = f"other-{uuid4().hex[:12]}"
    boto3.client("s3", endpoint_url=s3_server).create_bucket(Bucket=bucket)
    store = f"s3://{bucket}/a/store"
    remember_options(store, {"endpoint_url": s3_server})
    create(f"{store}/{MARKER}", b"{}")
    selection = put_selection(Store(store))
    assert open_selection(selection).to_arrow().read_all().num_rows == NUM_ROWS
    assert len(open_selection(selection).to_datasets()) == NUM_ROWS
    assert reports("status", store)[1]["store"] == store
    assert reports("publish", "mine", "--to", selection, "--store", store)[0] == 0
    assert open_selection(f"{store}#mine").num_rows == NUM_ROWS
    checked = reports("verify", store)[1]["checked"]
    assert (checked["manifests"], checked["names"]) == (2, 1)
    assert reports("prune", store)[0] == 0


def test_options_of_the_nearest_store(tmp_path, monkeypatch):
    remember_options("s3://b/one", {"endpoint_url": "http://one"})
    remember_options("s3://b/one/two/", {"endpoint_url": "http://two"})
    assert known_options("s3://b/one/x")["endpoint_url"] == "http://one"
    assert known_options("s3://b/one/two/x")["endpoint_url"] == "http://two"
    assert known_options("s3://b/one/twofold")["endpoint_url"] == "http://one"
    for other in ("s3://b/onefold/x", "s3://c", "gs://b/one/x", "/b/one"):
        assert known_options(other) == {}
    remember_options("s3://b/one", {})  # of a spec without options
    kept = json.loads((tmp_path / "stillhouse" / "stores.json").read_text())
    assert kept == {"s3://b/one/two": {"endpoint_url": "http://two"}}
    # options of the process come first
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://other")
    assert known_options("s3://b/one/two/x") == {}
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setitem(conf, "s3", {"endpoint_url": "http://other"})
    assert known_options("s3://b/one/two/x") == {}


def test_a_home_that_cannot_be_written_and_a_broken_file(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    remember_options("s3://b/one", {"endpoint_url": "http://one"})
    assert known_options("s3://b/one/x") == {}
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "stillhouse").mkdir()
    (tmp_path / "stillhouse" / "stores.json").write_text("{")
    assert known_options("s3://b/one/x") == {}
    assert not exists(str(tmp_path / "b"))
