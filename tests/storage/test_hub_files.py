"""Data sets of the hub: of a folder as `datasets` finds it, and by `hf://` from a small hub."""

import hashlib
import http.server
import json
import re
import threading
from urllib.parse import unquote

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.config import conf

from stillhouse.data_settings import DataSource
from stillhouse.errors import InputError, SpecError
from stillhouse.pipelines.inputs import list_source, open_inputs, scan_tasks
from stillhouse.storage.artifact import Store
from stillhouse.storage.filesystem import list_files, use_options
from stillhouse.text.tasks import read_unit

CARD = """---
configs:
- config_name: short
  default: true
  data_files: [{split: train, path: short/train-*}, {split: test, path: short/test-*}]
- {config_name: long, data_files: [{split: train, path: long/*}]}
---
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "name"
    for name in ("short/train-0", "short/train-1", "short/test-0", "long/all"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        table = pa.table({"text": [f"{name} {i}" for i in range(100)]})
        pq.write_table(table, path / f"{name}.parquet", row_group_size=40)
    (path / "lines").mkdir()
    (path / "lines" / "a.jsonl").write_text('{"text": "a line"}\n')
    (path / "README.md").write_text(CARD)
    return path


def texts(path, store="/nowhere"):
    source = DataSource(path=path)
    inputs = open_inputs(Store(str(store)), source, list_source(source), 50, remember=False)
    return [d.text for task in scan_tasks(inputs) for d in read_unit(task)]


@pytest.mark.parametrize(
    ("query", "config", "split"),
    [
        ("", None, "train"),
        ("?split=test", None, "test"),
        ("?config=long", "long", "train"),
        ("?config=short&split=test", "short", "test"),
    ],
)
def test_a_data_set_has_the_rows_that_datasets_streams(folder, query, config, split):
    stream = datasets.load_dataset(str(folder), config, split=split, streaming=True)
    assert texts(f"hub://{folder}{query}") == [row["text"] for row in stream]


def test_its_files_are_identified_as_any_others(folder, tmp_path):
    def tasks(path):
        source = DataSource(path=path)
        opened = open_inputs(Store(str(tmp_path / "store")), source, list_source(source), 50)
        return [task.fingerprint for task in scan_tasks(opened)]

    by_name = tasks(f"hub://{folder}?split=train")
    assert len(by_name) > 2
    assert by_name == tasks([f"{folder}/short/train-0.parquet", f"{folder}/short/train-1.parquet"])


def test_what_is_not_there(folder):
    for query, error, said in (
        ("?split=dev", InputError, "no split `dev`; there are train, test"),
        ("?config=longer", InputError, "longer"),
        ("?splits=train", SpecError, r"unknown \['splits'\]; there are split, config, revision"),
    ):
        with pytest.raises(error, match=said):
            list_files([f"hub://{folder}{query}"], [])
    with pytest.raises(InputError, match="nothing"):
        list_files([f"hub://{folder}/nothing"], [])


class Hub(http.server.BaseHTTPRequestHandler):
    """One repository, `org/name`: its branch `main` is at the last of the server's commits."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(self.path.split("?")[0])
        commits = self.server.commits
        found = re.fullmatch(r"/api/datasets/org/name/(revision|tree)/(\w+)/?(.*)", path)
        if found is None:
            found = re.fullmatch(r"/(datasets)/org/name/resolve/(\w+)/(.*)", path)
        if path == "/api/datasets/org/name":
            return self._json({"id": "org/name", "sha": [*commits][-1]})
        if found is None or (found[2] != "main" and found[2] not in commits):
            return self._json({"error": "Repository not found"}, 404, "RepoNotFound")
        sha = [*commits][-1] if found[2] == "main" else found[2]
        if found[1] == "revision":
            return self._json({"id": "org/name", "sha": sha})
        if found[1] == "tree" and found[3] in commits[sha]:  # a file
            return self._json({"error": "not a folder"}, 404, "EntryNotFound")
        if found[1] == "tree":
            return self._json(self._tree(commits[sha], found[3]))
        self.server.read.add(found[2])
        return self._file(commits[sha][found[3]])

    def _tree(self, files, folder):
        inside = {name for name in files if not folder or name.startswith(f"{folder}/")}
        rest = {name: name[len(folder) :].strip("/") for name in inside}
        folders = {name[: -len(r)] + r.split("/")[0] for name, r in rest.items() if "/" in r}
        recursive = "recursive=true" in self.path.lower()
        return [
            {"type": "directory", "oid": "0" * 40, "size": 0, "path": p} for p in sorted(folders)
        ] + [
            {
                "type": "file",
                "oid": hashlib.sha1(files[name]).hexdigest(),
                "size": len(files[name]),
                "path": name,
            }
            for name, r in rest.items()
            if recursive or "/" not in r
        ]

    def _json(self, content, code=200, error=None):
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        if error:
            self.send_header("X-Error-Code", error)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def _file(self, data):
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        total = len(data)
        self.send_response(206 if span else 200)
        if span:
            data = data[int(span[1]) : int(span[2]) + 1]
            self.send_header(
                "Content-Range", f"bytes {span[1]}-{int(span[1]) + len(data) - 1}/{total}"
            )
        self.send_header("ETag", '"x"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(folder, monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    server.commits, server.read = {"a" * 40: files}, set()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setitem(conf, "hf", {})
    use_options("hf://", {"endpoint": f"http://127.0.0.1:{server.server_port}"})
    yield server
    server.shutdown()
    thread.join()
    fsspec.get_filesystem_class("hf").clear_instance_cache()


@pytest.mark.parametrize("path", ["short", "short/train-*.parquet", "short/train-0.parquet"])
def test_files_by_uri_have_the_commit_in_it(hub, folder, path):
    found = list_files([f"hf://datasets/org/name/{path}"], [".parquet"])
    local = list_files([str(folder / path)], [".parquet"])
    assert [f.name for f in found] == [f.name for f in local]
    assert [f.size_bytes for f in found] == [f.size_bytes for f in local]
    assert {f.uri.rpartition("/")[0] for f in found} == {f"hf://datasets/org/name@{'a' * 40}/short"}
    assert texts(f"hf://datasets/org/name/{path}") == texts(str(folder / path))
    assert hub.read == {"a" * 40}


def test_a_push_changes_nothing_of_a_listing(hub):
    uri = "hf://datasets/org/name/lines/a.jsonl"
    source = DataSource(path=uri)
    inputs = open_inputs(Store("/nowhere"), source, list_source(source), 50, remember=False)
    hub.commits["b" * 40] = {"lines/a.jsonl": b'{"text": "a new line"}\n'}
    fsspec.get_filesystem_class("hf").clear_instance_cache()
    assert [d.text for t in scan_tasks(inputs) for d in read_unit(t)] == ["a line"]
    assert texts(uri) == ["a new line"]
    assert texts(f"hf://datasets/org/name@{'a' * 40}/lines/a.jsonl") == ["a line"]


def test_no_such_repository(hub):
    with pytest.raises(InputError, match=r"hf://datasets/org/other/a\.jsonl"):
        list_files(["hf://datasets/org/other/a.jsonl"], [])
