"""Google Cloud Storage and Azure Blob Storage, where they differ from what all stores do."""

import os
import time

import fsspec
import pytest

from stillhouse.errors import InputError, StorageError, StoreUnreachableError
from stillhouse.storage import retries
from stillhouse.storage.commit import check_store, create
from stillhouse.storage.filesystem import list_files, list_names, read_bytes

LARGE = 9 << 20  # more than both send in one request


@pytest.fixture(params=["gcs_bucket", "container"])
def cloud(request):
    """The URI of an empty bucket."""
    return request.getfixturevalue(request.param)


def test_a_large_object_is_created_once(cloud):
    data = os.urandom(LARGE)
    assert create(f"{cloud}/x", data)
    assert not create(f"{cloud}/x", b"1" + data)
    assert not create(f"{cloud}/x", b"1")
    assert read_bytes(f"{cloud}/x") == data


def test_what_was_written_since_is_listed(cloud):
    assert create(f"{cloud}/a/1.txt", b"1")
    assert list_names(f"{cloud}/a") == ["1.txt"]
    assert create(f"{cloud}/a/2.txt", b"22")
    assert list_names(f"{cloud}/a") == ["1.txt", "2.txt"]
    [alone] = list_files([f"{cloud}/a/2.txt"], (".txt",))
    assert (alone.uri, alone.name, alone.size_bytes) == (f"{cloud}/a/2.txt", "2.txt", 2)


def test_no_such_bucket(cloud):
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"no such bucket: make it or give another `store`"):
        check_store(f"{cloud}-none/store")
    with pytest.raises(InputError, match=r"there is no bucket 'stillhouse-.*-none'"):
        list_files([f"{cloud}-none/pool"], (".txt",))
    assert time.monotonic() - started < retries._PATIENCE_S  # neither was tried for long


def test_refused_credentials(gcs_bucket, gcs_server, container, monkeypatch):
    monkeypatch.setattr(gcs_server, "refusing", True)
    given = os.environ["AZURE_STORAGE_CONNECTION_STRING"]
    key = given.split("AccountKey=")[1].split(";")[0]
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", given.replace(key, "A" * 86 + "=="))
    azure = fsspec.get_filesystem_class("abfs")
    azure.clear_instance_cache()  # which know the right key
    for uri in (gcs_bucket, container):
        with pytest.raises(StorageError, match="no access: check the credentials") as error:
            check_store(f"{uri}/refused")
        assert not isinstance(error.value, StoreUnreachableError)
    azure.clear_instance_cache()
