import multiprocessing
import os
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stillhouse.errors import StorageError, UnsafeStoreError
from stillhouse.storage.commit import check_store, create, create_or_adopt, replace
from stillhouse.storage.filesystem import join, list_names, read_bytes


def race(uri, names, barrier):
    """Each of `names` tries to create `uri` with its own bytes; returns what each saw."""

    def write(name):
        data = name.encode() * 1000
        barrier.wait()
        made = create(uri, data)
        return name, made, read_bytes(uri)

    with ThreadPoolExecutor(len(names)) as threads:
        return list(threads.map(write, names))


def race_in_process(uri, names, barrier, results):
    results.put(race(uri, names, barrier))


def check_race(seen):
    winners = [name for name, made, _ in seen if made]
    assert len(winners) == 1
    assert {data for _, _, data in seen} == {winners[0].encode() * 1000}


def test_one_of_sixteen_threads_wins(folder):
    for round_ in range(5):
        names = [f"{i:02d}" for i in range(16)]
        check_race(race(join(folder, f"parts/{round_}"), names, threading.Barrier(16)))


def test_one_of_sixteen_writers_in_two_processes_wins(folder):
    spawn = multiprocessing.get_context("spawn")
    barrier, results = spawn.Barrier(16), spawn.Queue()
    groups = [[f"{8 * p + i:02d}" for i in range(8)] for p in range(2)]
    args = [(join(folder, "parts/x"), names, barrier, results) for names in groups]
    processes = [spawn.Process(target=race_in_process, args=a) for a in args]
    for process in processes:
        process.start()
    seen = [entry for _ in processes for entry in results.get(timeout=120)]
    for process in processes:
        process.join()
    check_race(seen)


def test_loser_adopts(folder):
    uri = join(folder, "a/b.bin")
    assert create_or_adopt(uri, b"first") == b"first"
    assert create_or_adopt(uri, b"second") == b"first"
    assert read_bytes(uri) == b"first"


def test_nothing_but_the_name_is_left(folder):
    for data in (b"1", b"2"):
        create(join(folder, "a"), data)
    replace(join(folder, "b"), b"3")
    replace(join(folder, "b"), b"4")
    assert list_names(folder) == ["a", "b"]
    assert read_bytes(join(folder, "b")) == b"4"


def test_empty_object(folder):
    assert create(join(folder, "empty"), b"")
    assert not create(join(folder, "empty"), b"x")
    assert read_bytes(join(folder, "empty")) == b""


def test_multipart_create_is_exclusive(bucket):
    data = b"0123456789abcdef" * (101 << 16)  # s3fs sends 100 MiB and more in pieces
    assert create(f"{bucket}/large", data)
    assert not create(f"{bucket}/large", b"1" + data)
    assert read_bytes(f"{bucket}/large") == data


def test_lost_answer_counts_as_taken_and_is_adopted(bucket, proxied):
    proxied.rule = lambda n, method, path: "lose answer" if n == 0 else None
    assert create_or_adopt(f"{bucket}/x", b"mine") == b"mine"
    assert [method for method, _ in proxied.requests] == ["PUT", "PUT", "GET"]


def test_requests(bucket, proxied):
    assert create(f"{bucket}/a/x", b"1")
    assert read_bytes(f"{bucket}/a/x") == b"1"
    assert [method for method, _ in proxied.requests] == ["PUT", "GET"]


def test_check_store(folder):
    assert check_store(folder) == folder
    assert check_store(folder) == folder
    assert list_names(folder) == ["store.json"]


def test_check_store_asks_once_when_it_is_known(bucket, proxied):
    check_store(bucket)
    check_store(bucket)
    assert [method for method, _ in proxied.requests] == ["PUT", "PUT", "PUT"]


def test_memory_filesystem_is_exclusive():
    assert check_store("memory://some/store") == "memory://some/store"


def test_filesystem_that_replaces_is_refused(replacing):
    with pytest.raises(UnsafeStoreError, match="replacing:// lets a second writer replace a name"):
        check_store("replacing://store")


@pytest.fixture
def replacing():
    """A filesystem whose exclusive create is none, as many are."""
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    class Replacing(MemoryFileSystem):
        protocol = "replacing"

        def pipe_file(self, path, value, mode="overwrite", **kwargs):
            super().pipe_file(path, value, mode="overwrite", **kwargs)

    fsspec.register_implementation("replacing", Replacing, clobber=True)


def test_store_is_a_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"")
    with pytest.raises(StorageError, match=r"store '.*/file' is a file, not a folder"):
        check_store(str(path))


def test_file_in_the_way(tmp_path):
    (tmp_path / "models").write_bytes(b"")
    for name in ("models/x", "models/deeper/x"):
        with pytest.raises(
            StorageError, match=r"writing .* failed: .*(folder is needed|Not a dir)"
        ):
            create(str(tmp_path / name), b"")


AS_NOBODY = """
import os, sys
sys.path[:0] = {path!r}
from stillhouse.errors import StorageError
from stillhouse.storage.commit import check_store
os.setuid({uid})
try:
    check_store({store!r})
except StorageError as error:
    print(error)
"""


def test_folder_that_may_not_be_written(tmp_path):
    """A child gives up its rights first, for root may write anywhere."""
    readonly = Path("/tmp") / f"stillhouse-{os.getpid()}-readonly"
    readonly.mkdir()
    readonly.chmod(stat.S_IRUSR | stat.S_IXUSR | stat.S_IROTH | stat.S_IXOTH)
    uid = 65534 if os.getuid() == 0 else os.getuid()
    code = AS_NOBODY.format(path=sys.path, uid=uid, store=str(readonly))
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    finally:
        readonly.rmdir()
    assert done.stdout.count("\n") == 1, done.stderr
    assert f"writing {readonly}/store.json failed" in done.stdout
    assert "no access" in done.stdout


def test_full_disk(small_disk):
    store = check_store(str(small_disk / "store"))
    with pytest.raises(
        StorageError, match=r"writing .*/a failed: .*No space left.*disk full: free"
    ):
        create(join(store, "a"), bytes(1 << 20))
    assert list_names(store) == ["store.json"]
    assert create(join(store, "a"), b"small")


def test_read_only_disk(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(
        StorageError, match=r"store.json failed: .*\(read-only: give another `store"
    ):
        check_store(str(small_disk))
