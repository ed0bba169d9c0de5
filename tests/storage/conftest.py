"""Stores on a local folder and on S3 over real HTTP.

The server is moto's, on loopback; `STILLHOUSE_TEST_S3=URL` takes another one, with credentials
from the environment.
"""

import logging
import os
from uuid import uuid4

import boto3
import pytest
from fault_proxy import FaultProxy
from fsspec.config import conf
from moto.server import ThreadedMotoServer

from stillhouse.storage.artifact import Store
from stillhouse.storage.filesystem import use_options


@pytest.fixture(scope="session")
def s3_url():
    """The endpoint of an S3 server; the environment points to it for the session."""
    given = os.environ.get("STILLHOUSE_TEST_S3")
    with pytest.MonkeyPatch.context() as patch:
        if given is None:
            logging.getLogger("werkzeug").setLevel(logging.ERROR)
            server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
            server.start()
            host, port = server.get_host_and_port()
            patch.setenv("AWS_ACCESS_KEY_ID", "test")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret")
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        url = given or f"http://{host}:{port}"
        patch.setenv("AWS_ENDPOINT_URL", url)
        yield url
        if given is None:
            server.stop()


@pytest.fixture
def bucket(s3_url):
    """The URI of a new bucket."""
    name = f"stillhouse-{uuid4().hex[:12]}"
    boto3.client("s3", endpoint_url=s3_url).create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture(params=["local", "s3"])
def folder(request, tmp_path):
    """The URI of an empty folder to write into."""
    if request.param == "local":
        return str(tmp_path / "store")
    return request.getfixturevalue("bucket") + "/some/store"


@pytest.fixture
def store(folder):
    return Store(folder)


@pytest.fixture
def proxied(s3_url, monkeypatch):
    """A proxy that all S3 requests of the test go through; set its `rule`."""
    monkeypatch.setitem(conf, "s3", {})
    with FaultProxy(s3_url) as proxy:
        use_options("s3://", {"endpoint_url": proxy.url})
        yield proxy
