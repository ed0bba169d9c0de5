import gzip
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.config import conf

from stillhouse.errors import InputError, StorageError
from stillhouse.storage.commit import create, replace
from stillhouse.storage.filesystem import (
    absolute_uri,
    exists,
    filesystem,
    join,
    list_files,
    list_names,
    open_read,
    protocol_of,
    read_bytes,
    read_many,
    use_options,
)

SUFFIXES = [".parquet", ".jsonl"]


def put_all(folder, names):
    for name in names:
        replace(join(folder, name), name.encode())


def names_of(paths, suffixes=SUFFIXES):
    return [info.name for info in list_files(paths, suffixes)]


def test_uris(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = str(tmp_path.resolve())
    assert absolute_uri("store") == f"{here}/store"
    assert absolute_uri("a/../store/") == f"{here}/store"
    assert absolute_uri(f"file://{here}/store/") == f"{here}/store"
    assert absolute_uri("s3://bucket/store/") == "s3://bucket/store"
    assert absolute_uri("~/store") == str(Path.home() / "store")
    assert (protocol_of("s3://b"), protocol_of("/x")) == ("s3", "file")
    assert join("s3://b/", "x", "y") == "s3://b/x/y"


def test_read(folder):
    put_all(folder, ["a", "b/c"])
    assert read_bytes(join(folder, "b/c")) == b"b/c"
    assert read_many([join(folder, name) for name in ("b/c", "a")]) == [b"b/c", b"a"]
    assert read_many([]) == []
    assert (list_names(folder), list_names(join(folder, "b"))) == (["a", "b"], ["c"])
    assert exists(join(folder, "a"))
    assert not exists(join(folder, "b/d"))
    for read in (read_bytes, open_read):
        with pytest.raises(FileNotFoundError):
            read(join(folder, "nothing"))


def test_open_read_is_a_file(folder):
    lines = [f"line {i} é\n" for i in range(20_000)]
    replace(join(folder, "x.gz"), gzip.compress("".join(lines).encode()))
    with open_read(join(folder, "x.gz")) as file:
        assert list(io.TextIOWrapper(gzip.GzipFile(fileobj=file), encoding="utf-8")) == lines
    data = random.Random(0).randbytes((4 << 20) + 1000)
    replace(join(folder, "x"), data)
    with open_read(join(folder, "x")) as file:
        assert file.read(10) == data[:10]
        assert file.seek(-10, io.SEEK_END) == len(data) - 10
        assert file.read() == data[-10:]
        assert file.read(5) == b""
        assert file.seek(5) == 5
        assert file.read() == data[5:]
        file.seek(4 << 20)
        file.seek(-4, io.SEEK_CUR)
        assert file.read(100) == data[(4 << 20) - 4 :][:100]


def test_reading_text_is_one_request_each_4_mib(bucket, proxied):
    replace(f"{bucket}/x", b"0123456\n" * (1 << 20))
    proxied.requests.clear()
    with open_read(f"{bucket}/x") as file:
        assert sum(1 for _ in io.TextIOWrapper(file)) == 1 << 20
    assert [method for method, _ in proxied.requests] == ["HEAD", "GET", "GET"]


def test_row_groups_through_open_read(bucket, proxied):
    table = pa.table({"x": random.Random(0).choices(range(10**9), k=100_000)})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=10_000)
    replace(f"{bucket}/x.parquet", buffer.getvalue())
    proxied.requests.clear()
    with open_read(f"{bucket}/x.parquet") as stream:
        file = pq.ParquetFile(stream)
        groups = [file.read_row_group(g) for g in range(10)]
    assert pa.concat_tables(groups).equals(table)
    assert [method for method, _ in proxied.requests] == ["HEAD", "GET", "GET"]


def test_list_folder(folder):
    names = ["b.parquet", "a.jsonl", "deep/c.PARQUET", "a.txt", ".hidden.jsonl"]
    put_all(folder, [*names, "_tmp/d.jsonl", "deep/.x/e.jsonl", "a.jsonl.tmp"])
    found = list_files([folder], SUFFIXES)
    assert [f.name for f in found] == ["a.jsonl", "b.parquet", "deep/c.PARQUET"]
    assert [f.uri for f in found] == [join(folder, f.name) for f in found]
    assert [f.size_bytes for f in found] == [7, 9, 14]
    assert list_files([folder], SUFFIXES) == found
    replace(join(folder, "a.jsonl"), b"another")
    after = list_files([folder], SUFFIXES)
    assert after[0].stamp != found[0].stamp and after[1:] == found[1:]


def test_list_globs_and_files(folder):
    put_all(folder, ["x/a.jsonl", "x/b.jsonl", "y/a.jsonl", "y/_c.jsonl", "y/d.txt"])
    assert names_of([join(folder, "*/a.jsonl")]) == ["x/a.jsonl", "y/a.jsonl"]
    assert names_of([join(folder, "x/?.jsonl")]) == ["a.jsonl", "b.jsonl"]
    assert names_of([join(folder, "**/b.jsonl")]) == ["x/b.jsonl"]
    # a named file is listed, whatever its suffix or first character
    assert names_of([join(folder, "y/d.txt")]) == ["d.txt"]
    assert names_of([join(folder, "y/_*")]) == ["_c.jsonl"]
    # each file once
    paths = [join(folder, "x"), join(folder, "x/*"), join(folder, "x/b.jsonl")]
    assert names_of(paths) == ["a.jsonl", "b.jsonl"]


def test_suffixes_of_which_one_is_enough(folder):
    put_all(folder, ["data/a.jsonl", "data/README.md", "texts/README.md"])
    listed = list_files([folder], SUFFIXES, [".md"])
    assert [f.name for f in listed] == ["data/a.jsonl"]
    listed = list_files([join(folder, "texts"), join(folder, "data/*")], SUFFIXES, [".md"])
    assert [f.name for f in listed] == ["README.md", "README.md", "a.jsonl"]


def test_links_to_folders_are_followed_once(tmp_path):
    put_all(str(tmp_path), ["pool/a.jsonl", "elsewhere/deep/b.jsonl"])
    (tmp_path / "pool" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "pool" / "linked too").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "pool")
    assert names_of([str(tmp_path / "pool")]) == ["a.jsonl", "linked/deep/b.jsonl"]


def test_names_and_folders_that_are_refused(tmp_path):
    with pytest.raises(StorageError, match=r"reading .* failed: .*Is a directory"):
        read_bytes(str(tmp_path))
    (tmp_path / os.fsdecode(b"\xff.jsonl")).write_bytes(b"x")
    with pytest.raises(InputError, match=r"xff.jsonl' is not UTF-8: rename it"):
        list_files([str(tmp_path)], SUFFIXES)


def test_a_bracket_that_is_part_of_a_name(tmp_path):
    put_all(str(tmp_path), ["pool [v1]/a.jsonl"])
    with pytest.raises(InputError, match=r"write '.*/pool \[\[\]v1\]/\*' if the bracket"):
        list_files([str(tmp_path / "pool [v1]" / "*")], SUFFIXES)
    escaped = str(tmp_path / "pool [[]v1]" / "*")
    assert names_of([escaped]) == ["pool [v1]/a.jsonl"]
    for path in ("pool [v1]", "pool [v1]/a.jsonl"):
        assert names_of([str(tmp_path / path)]) == ["a.jsonl"]


def test_nothing_matches(folder):
    assert list_names(folder) == list_names(join(folder, "nothing")) == []
    put_all(folder, ["x/a.txt"])
    for path in ("x", "nothing", "x/*.jsonl", "x/b.txt"):
        with pytest.raises(InputError, match=rf"no files match '.*{path[-3:]}' \(looking for"):
            list_files([join(folder, path)], SUFFIXES)


def test_stamp_tells_a_change_behind_a_link_and_a_restored_time(tmp_path):
    data = tmp_path / "blob"
    data.write_bytes(b"one")
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "a.jsonl").symlink_to(data)
    (tmp_path / "pool" / "gone.jsonl").symlink_to(tmp_path / "nothing")
    [before] = list_files([str(tmp_path / "pool" / "*.jsonl")], SUFFIXES)
    assert list_files([str(tmp_path / "pool")], SUFFIXES) == [before]
    assert names_of([before.uri]) == ["a.jsonl"]
    times = os.stat(data)
    (tmp_path / "other").write_bytes(b"two")
    os.utime(tmp_path / "other", ns=(times.st_atime_ns, times.st_mtime_ns))
    os.replace(tmp_path / "other", data)
    [after] = list_files([str(tmp_path / "pool")], SUFFIXES)
    assert after.stamp != before.stamp


def test_unreadable_folder_is_no_empty_folder(tmp_path):
    put_all(str(tmp_path), ["a.jsonl", "closed/b.jsonl"])
    (tmp_path / "closed").chmod(0)
    code = (
        f"import os, sys; sys.path[:0] = {sys.path!r}\n"
        "from stillhouse.storage.filesystem import list_files\n"
        f"os.chdir({str(tmp_path)!r}); os.getuid() or os.setuid(65534)\n"
        "list_files(['.'], ['.jsonl'])"
    )
    for folder in [tmp_path, *tmp_path.parents]:
        if folder.stat().st_uid == os.getuid() and folder != Path("/tmp"):
            folder.chmod(folder.stat().st_mode | 0o055)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    (tmp_path / "closed").chmod(0o700)
    assert "StorageError: listing" in done.stderr
    assert "Permission denied" in done.stderr


def test_options_reach_fsspec_and_workers(s3_url, bucket, monkeypatch):
    monkeypatch.setitem(conf, "s3", {})
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    options = {"endpoint_url": s3_url, "config_kwargs": {"s3": {"addressing_style": "path"}}}
    env = use_options(bucket, options)
    assert {name: json.loads(value) for name, value in env.items()} == {"FSSPEC_S3": options}
    assert create(f"{bucket}/x", b"seen")
    code = (
        "from stillhouse.storage.filesystem import filesystem, read_bytes\n"
        f"print(read_bytes('{bucket}/x'), filesystem('{bucket}')[0].config_kwargs)"
    )
    child = {**os.environ, **env, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=child, capture_output=True, text=True)
    assert done.stdout == (
        "b'seen' {'connect_timeout': 10, 'read_timeout': 20, "
        "'retries': {'total_max_attempts': 1, 'mode': 'standard'}, "
        "'s3': {'addressing_style': 'path'}}\n"
    ), done.stderr


def test_local_paths_need_no_fsspec(tmp_path):
    code = (
        "import sys\nfrom stillhouse.storage.commit import check_store\n"
        f"check_store({str(tmp_path)!r})\nprint({{'fsspec', 'torch'}} & set(sys.modules))"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_globs_leave_hidden_and_unfinished_files(folder):
    """A wildcard does not match `.x` or `_x` on any level, unless the pattern spells one."""
    hidden = ["_temporary/0/b.jsonl", ".x/c.jsonl", "deep/_d.jsonl", "deep/.e.jsonl", "_SUCCESS"]
    put_all(folder, ["a.jsonl", "deep/f.jsonl", "deep/g_.jsonl", *hidden])
    assert names_of([join(folder, "**/*.jsonl")]) == ["a.jsonl", "deep/f.jsonl", "deep/g_.jsonl"]
    assert names_of([join(folder, "*")]) == ["a.jsonl"]
    assert names_of([join(folder, "*/*.jsonl")]) == ["deep/f.jsonl", "deep/g_.jsonl"]
    assert names_of([join(folder, "_temporary/*/*.jsonl")]) == ["0/b.jsonl"]
    assert names_of([join(folder, "deep/_*.jsonl")]) == ["_d.jsonl"]
    with pytest.raises(InputError, match=r"begin with . or _ are hidden or unfinished"):
        list_files([join(folder, "_*/*.parquet")], SUFFIXES)


def test_globs_end_where_links_go_in_a_circle(tmp_path):
    put_all(str(tmp_path), ["pool/a.jsonl", "pool/x/b.jsonl"])
    for name in ("pool/round", "pool/x/back", "pool/x/again"):
        (tmp_path / name).symlink_to(tmp_path / "pool")
    assert names_of([str(tmp_path / "pool" / "**" / "*.jsonl")]) == ["a.jsonl", "x/b.jsonl"]
    assert names_of([str(tmp_path / "**" / "b.jsonl")]) == ["pool/x/b.jsonl"]


ODD_NAMES = [
    "a b.jsonl",
    "a#b.jsonl",
    "a%20b.jsonl",
    "a+b.jsonl",
    "a::b.jsonl",
    "a?b.jsonl",
    "a*b.jsonl",
    "a[1].jsonl",
    "a{b}.jsonl",
    "a&b;c=d.jsonl",
    "'a\".jsonl",
    "caf\u00e9.jsonl",
    "cafe\u0301.jsonl",
    "\U0001f600.jsonl",
    "k=v/part 0.jsonl",
]


def test_odd_names(folder):
    """In a folder and each by its own URI; two spellings of one accent are two files."""
    put_all(folder, ODD_NAMES)
    found = list_files([folder], SUFFIXES)
    assert sorted(f.name for f in found) == sorted(ODD_NAMES)
    for info in found:
        assert read_bytes(info.uri) == info.name.encode()
        with open_read(info.uri) as file:
            assert file.read() == info.name.encode()
        [alone] = list_files([info.uri], SUFFIXES)
        assert (alone.uri, alone.stamp) == (info.uri, info.stamp)


def test_a_bucket_that_is_not_there(bucket):
    for path in ("s3://no-such-bucket/pool", "s3://no-such-bucket", "s3://no-such-bucket/*.jsonl"):
        with pytest.raises(InputError, match="there is no bucket 'no-such-bucket'"):
            list_files([path], SUFFIXES)
    with pytest.raises(InputError, match="no files match"):
        list_files([join(bucket, "pool")], SUFFIXES)


def test_empty_objects_that_stand_for_folders(bucket):
    put_all(bucket, ["pool/a.jsonl"])
    for key in ("pool/", "pool/sub/", "pool/old_$folder$", "pool/b.jsonl/"):
        fs, path = filesystem(join(bucket, "x"))
        fs.pipe_file(path[:-1] + key, b"")
    assert names_of([join(bucket, "pool")]) == ["a.jsonl"]
