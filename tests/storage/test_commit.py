import multiprocessing
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

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


def test_one_of_sixteen_writers_in_two_processes_wins(folder):
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    for number in range(3):
        barrier, uri = spawn.Barrier(16), join(folder, f"parts/{number}")
        groups = [[f"{8 * p + i:02d}" for i in range(8)] for p in range(2)]
        args = (uri, groups[1], barrier, results)
        process = spawn.Process(target=race_in_process, args=args)
        process.start()
        seen = race(uri, groups[0], barrier) + results.get(timeout=120)
        process.join()
        [winner] = [name for name, made, _ in seen if made]
        assert {data for _, _, data in seen} == {winner.encode() * 1000}


def test_create_adopt_and_replace(folder):
    uri = join(folder, "a/b.bin")
    assert create_or_adopt(uri, b"first") == create_or_adopt(uri, b"second") == b"first"
    assert read_bytes(uri) == b"first"
    assert create(join(folder, "empty"), b"")
    assert not create(join(folder, "empty"), b"x")
    for data in (b"3", b"4"):
        replace(join(folder, "b"), data)
    assert list_names(folder) == ["a", "b", "empty"]
    assert (read_bytes(join(folder, "b")), read_bytes(join(folder, "empty"))) == (b"4", b"")


def test_multipart_create_is_exclusive(bucket):
    data = b"0123456789abcdef" * (101 << 16)  # s3fs sends 100 MiB and more in pieces
    assert create(f"{bucket}/large", data)
    assert not create(f"{bucket}/large", b"1" + data)
    assert read_bytes(f"{bucket}/large") == data


def test_requests(bucket, proxied):
    """A put whose answer is lost counts as taken, and its bytes are adopted."""

    def requests(call):
        proxied.requests.clear()
        call()
        return [method for method, _ in proxied.requests]

    assert requests(lambda: create(f"{bucket}/a/x", b"1")) == ["PUT"]
    assert requests(lambda: read_bytes(f"{bucket}/a/x")) == ["GET"]
    assert requests(lambda: check_store(bucket)) == ["PUT", "PUT"]
    assert requests(lambda: check_store(bucket)) == ["PUT"]
    proxied.rule = lambda n, method, path: "lose answer" if not proxied.faults else None
    adopted = []
    call = requests(lambda: adopted.append(create_or_adopt(f"{bucket}/x", b"mine")))
    # a busy server may drop further connections: then a request is made again
    assert adopted == [b"mine"] and call.count("PUT") > 1
    assert [method for method, _ in groupby(call)] == ["PUT", "GET"]


def test_check_store(folder):
    assert check_store(folder) == check_store(folder) == folder
    assert list_names(folder) == ["store.json"]


def test_filesystems_of_fsspec():
    class Replacing(MemoryFileSystem):
        """Its exclusive create is none, as in many."""

        protocol = "replacing"

        def pipe_file(self, path, value, mode="overwrite", **kwargs):
            super().pipe_file(path, value, mode="overwrite", **kwargs)

    assert check_store("memory://some/store") == "memory://some/store"
    fsspec.register_implementation("replacing", Replacing, clobber=True)
    with pytest.raises(UnsafeStoreError, match="replacing:// lets a second writer replace a name"):
        check_store("replacing://store")


def test_files_in_the_way(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=r"store '.*/file' is a file, not a folder"):
        check_store(str(tmp_path / "file"))
    for name in ("file/x", "file/deeper/x"):
        with pytest.raises(StorageError, match=r"writing .*: .*(folder is needed|Not a dir)"):
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


def test_folder_without_write_permission(tmp_path):
    """In a child that gives up its rights, because root may write anywhere."""
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


def test_full_and_read_only_disks(small_disk):
    store = check_store(str(small_disk / "store"))
    with pytest.raises(StorageError, match=r"writing .*/a failed: .*No space left.*disk full"):
        create(join(store, "a"), bytes(1 << 20))
    assert list_names(store) == ["store.json"]
    assert create(join(store, "a"), b"small")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StorageError, match=r"store.json failed: .*\(read-only: give another"):
        check_store(str(small_disk))
