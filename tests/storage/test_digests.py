import os
from hashlib import sha256

import fsspec
import pyarrow as pa
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from stillhouse.errors import BadFileError
from stillhouse.storage.artifact import Store
from stillhouse.storage.commit import replace
from stillhouse.storage.digests import FileDigest, digest_files
from stillhouse.storage.filesystem import join, list_files, list_names
from stillhouse.storage.parquet import parquet_bytes


class CountingFileSystem(MemoryFileSystem):
    """A remote filesystem that records what is read of it."""

    protocol = "counting"
    store: dict = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    reads: list = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("counting://", "memory://"))

    def cat_file(self, path, start=None, end=None, **kwargs):
        self.reads.append(path.rsplit("/", 1)[-1])
        return super().cat_file(path, start, end, **kwargs)


def listed(uri):
    return list_files([uri], [".txt", ".parquet"])


def hexdigest(data):
    return sha256(data).hexdigest()


def test_digests(store, folder, tmp_path):
    table = pa.table({"x": range(10_000)})
    pool = join(folder, "pool")
    replace(join(pool, "a.txt"), b"one")
    replace(join(pool, "b.parquet"), parquet_bytes(table))
    replace(join(pool, "c.parquet"), b"no parquet")
    for _ in range(2):  # read, then cached
        assert digest_files(store, listed(pool)) == [
            FileDigest(hexdigest(b"one"), None),
            FileDigest(hexdigest(parquet_bytes(table)), (8192, 1808)),
            FileDigest(hexdigest(b"no parquet"), None),
        ]
    replace("memory://digests/b.txt", b"two")
    files = list_files([pool, "memory://digests"], [".txt"])
    assert [d.sha256 for d in digest_files(store, files)] == list(map(hexdigest, (b"one", b"two")))


def test_only_new_and_changed_files_are_read(tmp_path):
    fsspec.register_implementation("counting", CountingFileSystem, clobber=True)
    CountingFileSystem.reads.clear()
    CountingFileSystem.store.clear()
    store = Store(str(tmp_path))

    def reads(uri):
        CountingFileSystem.reads.clear()
        digests = [digest.sha256 for digest in digest_files(store, listed(uri))]
        return digests, sorted(CountingFileSystem.reads)

    replace("counting://pool/x/a.txt", b"1")
    replace("counting://pool/y/b.txt", b"2")
    digests = [hexdigest(b"1"), hexdigest(b"2")]
    assert reads("counting://pool") == (digests, ["a.txt", "b.txt"])
    assert reads("counting://pool") == (digests, [])
    replace("counting://pool/y/b.txt", b"3")  # the same size
    replace("counting://pool/z/c.txt", b"4")  # a new folder
    assert reads("counting://pool")[1] == ["b.txt", "c.txt"]
    assert reads("counting://pool/*/*.txt") == (list(map(hexdigest, (b"1", b"3", b"4"))), [])
    assert reads("counting://pool/[xy]/*.txt")[1] == []


def test_a_change_with_the_same_size_and_time_is_noticed(tmp_path):
    store = Store(str(tmp_path / "store"))
    path = tmp_path / "pool" / "a.txt"
    replace(str(path), b"one")
    files = listed(str(path.parent))
    digest_files(store, files)
    times = os.stat(path)
    path.write_bytes(b"two")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    [after] = digest_files(store, listed(str(path.parent)))
    assert after.sha256 == hexdigest(b"two")
    path.unlink()
    with pytest.raises(BadFileError, match=r"pool/a.txt vanished while it was read"):
        digest_files(Store(str(tmp_path)), files)


def test_without_remembering_nothing_is_written_and_new_files_have_no_digest(store, folder):
    replace(join(folder, "pool/a.txt"), b"one")
    digest_files(store, listed(join(folder, "pool")), remember=False)
    assert list_names(folder) == ["pool"]
    store.unread.clear()
    digest_files(store, listed(join(folder, "pool")))
    replace(join(folder, "pool/b.txt"), b"two")
    found = digest_files(store, listed(join(folder, "pool")), remember=False)
    assert found[0].sha256 == hexdigest(b"one")
    assert found[1].sha256 not in {hexdigest(b"two"), found[0].sha256}
    assert [uri.rsplit("/", 1)[-1] for uri in store.unread] == ["b.txt"]


def test_requests_when_nothing_changed(bucket, proxied):
    store = Store(f"{bucket}/store")
    for name in "abc":
        replace(f"{bucket}/pool/{name}.txt", name.encode())
    digest_files(store, listed(f"{bucket}/pool"))
    proxied.requests.clear()
    digest_files(store, listed(f"{bucket}/pool"))
    assert [method for method, _ in proxied.requests] == ["GET", "GET"]  # a page, the cache
