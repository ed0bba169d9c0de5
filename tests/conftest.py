"""Fixtures of all tests; libraries are limited to one thread each."""

import json
import logging
import os
import shutil
import socket
import subprocess
import tempfile
import time
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import hypothesis
import pytest

# Before the first import of numpy, torch or tokenizers, and inherited by Ray's workers.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# The default of 15 starves Ray's workers on a machine that does anything else.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
# Ten seconds by default: a test that reads what a node exports would wait for them.
os.environ["RAY_metrics_report_interval_ms"] = "1000"  # noqa: SIM112

# Tests must not fail because the machine is busy.
hypothesis.settings.register_profile("shared", deadline=None)
hypothesis.settings.load_profile("shared")

# Options of stores that runs remember go to a folder of their own, not to the user's.
CONFIG = tempfile.TemporaryDirectory(prefix="stillhouse-config-", ignore_cleanup_errors=True)
os.environ["XDG_CONFIG_HOME"] = CONFIG.name

# Ray's workers inherit them from the start of the session, whenever the server starts.
S3_KEYS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
}
os.environ.update(S3_KEYS)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """The address of a local Ray with four CPUs, started on first use."""
    import ray

    ray.init(
        address="local",  # whatever RAY_ADDRESS says
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=200_000_000,
        log_to_driver=False,
    )
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small pool and target of `small.make_world`."""
    from small import make_world

    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def finished(ray_cluster: None, world: Path) -> dict:
    """The result of a select job on the small world, in `world/store`, which no test changes."""
    from small import LEARNING, MODEL, Quiet, parse

    from stillhouse.jobs.run import run_job

    train = {"model": MODEL, "controls": ["random", "conditional_only", "dsir"], **LEARNING}
    return run_job(parse(world, train=train), Quiet())


@pytest.fixture(scope="session")
def given(finished: dict, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The finished job's tokenizer and models as sections of a spec."""
    folder = tmp_path_factory.mktemp("given")
    artifacts = finished["artifacts"]
    for name in ("tokenizer", "prior", "conditional"):
        shutil.copytree(artifacts[name], folder / name)
    return {name: {"path": str(folder / name)} for name in ("tokenizer", "prior", "conditional")}


@pytest.fixture(scope="session")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """An untrained tokenizer and models as sections of a spec."""
    from small import make_models

    return make_models(tmp_path_factory.mktemp("untrained"))


@pytest.fixture
def reports(capsys: pytest.CaptureFixture[str]):
    """Runs a command of the command line in this process: (exit code, the output of `--json`)."""
    from stillhouse.jobs.cli import app

    def call(*arguments: str):
        with pytest.raises(SystemExit) as stopped:
            app([*arguments, "--json"])
        return stopped.value.code, json.loads(capsys.readouterr().out)

    return call


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The endpoint of an S3 server over HTTP; no environment variable points to it.

    moto's, on loopback; `STILLHOUSE_TEST_S3=URL` takes another one, which accepts `S3_KEYS`.
    """
    given = os.environ.get("STILLHOUSE_TEST_S3")
    if given is not None:
        yield given
        return
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="session")
def s3_url(s3_server: str) -> Iterator[str]:
    """The same endpoint, which is set in the environment from now on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", s3_server)
        yield s3_server


@pytest.fixture
def bucket(s3_url: str) -> str:
    """The URI of a new bucket."""
    import boto3

    name = f"stillhouse-{uuid4().hex[:12]}"
    boto3.client("s3", endpoint_url=s3_url).create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture(scope="session")
def gcs_server() -> Iterator[Any]:
    """A server of Google Cloud Storage's API, which gcsfs talks to from now on."""
    from fsspec.config import conf
    from gcs_server import GcsServer

    with GcsServer() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", server.url)
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # it asks by gRPC
        patch.setenv("FSSPEC_GS", '{"token": "anon"}')  # of other processes
        patch.setitem(conf, "gs", {"token": "anon"})
        yield server


@pytest.fixture
def gcs_bucket(gcs_server: Any) -> str:
    """The URI of a new bucket."""
    from gcs_server import Bucket

    name = f"stillhouse-{uuid4().hex[:12]}"
    gcs_server.buckets[name] = Bucket()
    return f"gs://{name}"


@pytest.fixture(scope="session")
def azure_service() -> Iterator[Any]:
    """A client of Azurite, which adlfs talks to from now on.

    `azurite-blob` of the npm package has to be installed, or named by STILLHOUSE_TEST_AZURITE.
    """
    command = os.environ.get("STILLHOUSE_TEST_AZURITE") or shutil.which("azurite-blob")
    if command is None:
        pytest.skip("no azurite-blob: npm install -g azurite@3.35.0")
    from azure.storage.blob import BlobServiceClient

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--inMemoryPersistence", "--skipApiVersionCheck", "--silent", "--disableTelemetry"]
    key = b64encode(os.urandom(32)).decode()
    environment = os.environ | {"AZURITE_ACCOUNTS": f"stillhouse:{key}"}
    process = subprocess.Popen([command, "--blobPort", str(port), *options], env=environment)
    place = f"BlobEndpoint=http://127.0.0.1:{port}/stillhouse"
    given = f"DefaultEndpointsProtocol=http;AccountName=stillhouse;AccountKey={key};{place};"
    client = BlobServiceClient.from_connection_string(given)
    deadline = time.monotonic() + 60
    while not _answers(port):
        assert time.monotonic() < deadline and process.poll() is None, "Azurite does not start"
        time.sleep(0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AZURE_STORAGE_CONNECTION_STRING", given)
        yield client
    process.terminate()
    process.wait()


def _answers(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def container(azure_service: Any) -> str:
    """The URI of a new container."""
    name = f"stillhouse-{uuid4().hex[:12]}"
    azure_service.create_container(name)
    return f"abfs://{name}"


FOLDERS = {"s3": "bucket", "gs": "gcs_bucket", "abfs": "container"}


@pytest.fixture(params=["local", *FOLDERS])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URI of an empty folder, local and on servers of object stores."""
    if request.param == "local":
        return str(tmp_path / "store")
    return request.getfixturevalue(FOLDERS[request.param]) + "/some/store"


@pytest.fixture
def store(folder: str):
    """A store in `folder`."""
    from stillhouse.storage.artifact import Store

    return Store(folder)


@pytest.fixture
def proxied(s3_url: str, monkeypatch: pytest.MonkeyPatch):
    """A proxy that all S3 requests of the test go through; set its `rule`."""
    from fault_proxy import FaultProxy
    from fsspec.config import conf

    from stillhouse.storage.filesystem import use_options

    monkeypatch.setitem(conf, "s3", {})
    with FaultProxy(s3_url) as proxy:
        use_options("s3://", {"endpoint_url": proxy.url})
        yield proxy


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB; skipped where it cannot be mounted (not root)."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)
