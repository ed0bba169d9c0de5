import errno
import os
import random
import socket
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.config import conf

from stillhouse.errors import InputError, SpecError, StorageError
from stillhouse.storage import retries
from stillhouse.storage.artifact import Receipt, Store
from stillhouse.storage.commit import check_store, create, replace
from stillhouse.storage.filesystem import (
    exists,
    list_files,
    list_names,
    open_read,
    read_bytes,
    use_options,
)
from stillhouse.storage.parquet import parquet_bytes
from stillhouse.storage.retries import explain, with_retries

TABLE = pa.table({"x": list(range(1000))})


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(retries, "_FIRST_DELAY_S", 0.02)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(retries, "_PATIENCE_S", 0.3)


def failing(*errors):
    """An action that raises these errors in turn and then returns how often it was called."""
    left = list(errors)

    def action():
        if left:
            raise left.pop(0)
        return len(errors) + 1

    return action


def test_transient_errors_alone_are_retried():
    action = failing(TimeoutError(), OSError(errno.EIO, "?"), ConnectionResetError())
    assert with_retries(action, "reading x") == 4
    final = [
        PermissionError(errno.EACCES, "no"),
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EROFS, "Read-only file system"),
        NotADirectoryError(errno.ENOTDIR, "Not a directory"),
        ValueError("Invalid endpoint: x"),
    ]
    for error in final:
        with pytest.raises(StorageError, match="reading x failed") as caught:
            with_retries(failing(error), "reading x")
        assert caught.value.__cause__ is error
        assert caught.value.exit_code == 4
    for kind in (FileNotFoundError, FileExistsError, SpecError, KeyError):
        with pytest.raises(kind):
            with_retries(failing(kind("x")), "reading x")
    assert explain(TimeoutError(), "writing x") == "writing x failed: TimeoutError"


def full_round(store):
    """What a run does with storage, in small."""
    part = store.put_part("tokens/parts/a.parquet", TABLE, num_tokens=9)
    store.put_receipt("tokens", Receipt("a", (part,)))
    assert store.finished("tokens", ["a", "b"]) == {"a": Receipt("a", (part,))}
    replace(store.path("status.json"), b"{}")
    assert list_names(store.uri) == ["status.json", "tokens"]
    assert [f.name for f in list_files([store.path("tokens")], [".parquet"])] == ["parts/a.parquet"]
    with open_read(store.path(part.path)) as file:
        assert pq.read_table(file).equals(TABLE)
    assert not exists(store.path("nothing"))


@pytest.mark.parametrize("fault", ["500", "503", "reset", "truncate"])
def test_every_third_request_fails(bucket, proxied, fault):
    proxied.rule = lambda n, method, path: fault if n % 3 == 0 and method != "HEAD" else None
    full_round(Store(bucket))
    assert len(proxied.faults) >= 3


@pytest.mark.parametrize("seed", range(3))
def test_random_faults(bucket, proxied, seed):
    draw = random.Random(seed)
    kinds = ["500", "503", "reset", "truncate", "lose answer"]
    proxied.rule = lambda *_: draw.choice(kinds) if draw.random() < 0.2 else None
    for i in range(5):
        full_round(Store(f"{bucket}/{i}"))
    assert len(proxied.faults) > 5


def test_faults_between_the_ranges_of_a_file(bucket, proxied):
    data = random.Random(0).randbytes(9 << 20)
    create(f"{bucket}/x", data)
    proxied.requests.clear()
    proxied.rule = lambda n, method, path: "truncate" if n in (1, 4) else None
    with open_read(f"{bucket}/x") as file:
        assert b"".join(iter(lambda: file.read(1 << 20), b"")) == data
    # the size, then 4 + 4 + 1 MiB, two of them twice
    assert [m for m, _ in proxied.requests] == ["HEAD", "GET", "GET", "GET", "GET", "GET"]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("fault", ["500", "503", "reset"])
def test_dead_storage_is_given_up(bucket, proxied, fault, impatient):
    proxied.rule = lambda *_: fault
    for call in (
        lambda: create(f"{bucket}/x", b""),
        lambda: read_bytes(f"{bucket}/x"),
        lambda: open_read(f"{bucket}/x"),
        lambda: list_names(f"{bucket}/x"),
    ):
        with pytest.raises(StorageError, match=rf"{bucket}/x failed: "):
            call()


@pytest.mark.timeout(60)
def test_stalled_storage_is_given_up_and_the_user_says_when(bucket, proxied, impatient):
    use_options("s3://", {"config_kwargs": {"read_timeout": 1}})
    proxied.rule = lambda *_: "stall"
    with pytest.raises(StorageError, match="Read timeout"):
        read_bytes(f"{bucket}/x")
    assert len(proxied.requests) <= 3  # not 5 x 5 of them for each of ours


def test_failure_inside_arrow_keeps_its_type(bucket, proxied, impatient):
    create(f"{bucket}/x.parquet", parquet_bytes(TABLE))
    with open_read(f"{bucket}/x.parquet") as file:
        proxied.rule = lambda *_: "500"
        with pytest.raises(StorageError, match=r"x.parquet failed: "):
            pq.ParquetFile(file)


def test_no_access_and_no_bucket(bucket, proxied):
    """A call that fails is one request: retries of botocore and s3fs would multiply with ours."""
    replace_x = lambda uri: replace(uri + "/x", b"")  # noqa: E731
    proxied.rule = lambda *_: "403"
    for call in (
        check_store,
        lambda uri: read_bytes(uri + "/x"),
        list_names,
        lambda uri: list_files([uri], [".txt"]),
        replace_x,
    ):
        with pytest.raises(StorageError, match=r"AccessDenied by the proxy \(no access: check"):
            call(bucket)
    proxied.requests.clear()
    with pytest.raises(StorageError):
        check_store(bucket)
    assert len(proxied.requests) == 1
    proxied.rule = lambda *_: None
    for call in (check_store, replace_x):
        with pytest.raises(StorageError, match="there is no such bucket: make it or give another"):
            call("s3://no-such-bucket-here")
    with pytest.raises(InputError, match="/pool: there is no bucket 'no-such-bucket-here'"):
        list_files(["s3://no-such-bucket-here/pool"], [".txt"])


def test_endpoints_that_cannot_be_used(s3_url, monkeypatch, impatient):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    monkeypatch.setitem(conf, "s3", {"endpoint_url": f"http://127.0.0.1:{port}"})
    with pytest.raises(StorageError, match=r"nothing answers there: check AWS_ENDPOINT_URL"):
        check_store("s3://bucket/store")
    monkeypatch.setitem(conf, "s3", {"endpoint_url": "nonsense"})
    with pytest.raises(StorageError, match="Invalid endpoint: nonsense"):
        check_store("s3://bucket/store")
    with pytest.raises(StorageError, match=r"cannot open 'nosuch://x/store.json': Protocol not k"):
        check_store("nosuch://x")


def test_no_credentials(s3_url):
    code = "import stillhouse.storage.commit as c; c.check_store('s3://bucket/store')"
    env = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    env |= {"AWS_EC2_METADATA_DISABLED": "true", "AWS_ENDPOINT_URL": s3_url, "HOME": "/nonexistent"}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == (
        "stillhouse.errors.StorageError: writing s3://bucket/store/store.json failed: Unable to "
        "locate credentials (set AWS_PROFILE, AWS_ACCESS_KEY_ID or another of the standard sources)"
    )
