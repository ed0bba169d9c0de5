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
    """A remote filesystem that notes what is read of it."""

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


@pytest.fixture
def reads(tmp_path):
    fsspec.register_implementation("counting", CountingFileSystem, clobber=True)
    CountingFileSystem.reads.clear()
    CountingFileSystem.store.clear()
    return CountingFileSystem.reads


def listed(uri):
    return list_files([uri], [".txt", ".parquet"])


def hexdigest(data):
    return sha256(data).hexdigest()


def test_digests(store, folder):
    table = pa.table({"x": range(10_000)})
    pool = join(folder, "pool")
    replace(join(pool, "a.txt"), b"one")
    replace(join(pool, "b.parquet"), parquet_bytes(table))
    replace(join(pool, "c.parquet"), b"no parquet")
    for _ in range(2):  # fresh, then remembered
        assert digest_files(store, listed(pool)) == [
            FileDigest(hexdigest(b"one"), None),
            FileDigest(hexdigest(parquet_bytes(table)), (8192, 1808)),
            FileDigest(hexdigest(b"no parquet"), None),
        ]


def test_unchanged_listing_reads_nothing(tmp_path, reads):
    store = Store(str(tmp_path))
    for name in "abc":
        replace(f"counting://pool/{name}.txt", name.encode())
    first = digest_files(store, listed("counting://pool"))
    assert sorted(reads) == ["a.txt", "b.txt", "c.txt"]
    reads.clear()
    assert digest_files(store, listed("counting://pool")) == first
    assert reads == []


def test_only_what_is_new_is_read(tmp_path, reads):
    store = Store(str(tmp_path))
    replace("counting://pool/x/a.txt", b"1")
    replace("counting://pool/y/b.txt", b"2")
    digest_files(store, listed("counting://pool"))
    reads.clear()
    replace("counting://pool/y/b.txt", b"3")  # the same size
    replace("counting://pool/z/c.txt", b"4")  # a new folder
    found = digest_files(store, listed("counting://pool"))
    assert [d.sha256 for d in found] == [hexdigest(data) for data in (b"1", b"3", b"4")]
    assert sorted(reads) == ["b.txt", "c.txt"]


def test_other_listings_of_a_folder_keep_what_is_known(tmp_path, reads):
    store = Store(str(tmp_path))
    for name in "abc":
        replace(f"counting://pool/{name}.txt", name.encode())
    digest_files(store, listed("counting://pool/*.txt"))
    digest_files(store, listed("counting://pool/[ab].txt"))
    reads.clear()
    digest_files(store, listed("counting://pool"))
    assert reads == []


def test_change_that_hides_behind_its_size_and_time_is_noticed(tmp_path):
    store = Store(str(tmp_path / "store"))
    path = tmp_path / "pool" / "a.txt"
    replace(str(path), b"one")
    digest_files(store, listed(str(path.parent)))
    times = os.stat(path)
    path.write_bytes(b"two")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    [after] = digest_files(store, listed(str(path.parent)))
    assert after.sha256 == hexdigest(b"two")


def test_renamed_folder_has_the_same_digests(store, folder):
    for name in ("old", "new"):
        replace(join(folder, name, "a.txt"), b"one")
    old, new = (digest_files(store, listed(join(folder, name))) for name in ("old", "new"))
    assert old == new


def test_nothing_is_written_unless_it_is_remembered(store, folder):
    replace(join(folder, "pool/a.txt"), b"one")
    digest_files(store, listed(join(folder, "pool")), remember=False)
    assert list_names(folder) == ["pool"]


def test_without_remembering_only_what_is_known_has_its_digest(store, folder):
    replace(join(folder, "pool/a.txt"), b"one")
    digest_files(store, listed(join(folder, "pool")))
    replace(join(folder, "pool/b.txt"), b"two")
    found = digest_files(store, listed(join(folder, "pool")), remember=False)
    assert found[0].sha256 == hexdigest(b"one")
    assert found[1].sha256 not in {hexdigest(b"two"), found[0].sha256}
    assert [uri.rsplit("/", 1)[-1] for uri in store.unread] == ["b.txt"]


def test_files_of_several_places(store, folder, tmp_path):
    replace(join(folder, "pool/a.txt"), b"one")
    replace("memory://digests/b.txt", b"two")
    files = list_files([join(folder, "pool"), "memory://digests"], [".txt"])
    for _ in range(2):
        found = digest_files(store, files)
        assert [d.sha256 for d in found] == [hexdigest(b"one"), hexdigest(b"two")]


def test_vanished_file(tmp_path):
    replace(str(tmp_path / "pool/a.txt"), b"one")
    files = listed(str(tmp_path / "pool"))
    (tmp_path / "pool/a.txt").unlink()
    with pytest.raises(BadFileError, match=r"pool/a.txt vanished while it was read"):
        digest_files(Store(str(tmp_path)), files)


def test_requests_when_nothing_changed(bucket, proxied):
    store = Store(f"{bucket}/store")
    for name in "abc":
        replace(f"{bucket}/pool/{name}.txt", name.encode())
    digest_files(store, listed(f"{bucket}/pool"))
    proxied.requests.clear()
    digest_files(store, listed(f"{bucket}/pool"))
    assert [method for method, _ in proxied.requests] == ["GET", "GET"]  # a page, the cache
