"""Files on web servers: one that knows ranges, one that does not, and what they say otherwise."""

import gzip
import http.server
import random
import re
import threading

import pyarrow as pa
import pytest

from stillhouse.data_settings import DataSource
from stillhouse.errors import InputError, StorageError
from stillhouse.pipelines.inputs import list_source, open_inputs, scan_tasks
from stillhouse.storage.artifact import Store
from stillhouse.storage.digests import digest_files
from stillhouse.storage.filesystem import list_files, open_read
from stillhouse.storage.parquet import parquet_bytes
from stillhouse.text.documents import read_documents
from stillhouse.text.records import folder_keys

LINES = b"".join(b'{"text": "document %d"}\n' % i for i in range(300))
LARGE = random.Random(1).randbytes(9 << 20)
FILES = {
    "a.jsonl": LINES,
    "a.jsonl.gz": gzip.compress(LINES),
    "large.txt": LARGE,
    "empty.txt": b"",
    "a.parquet": parquet_bytes(pa.table({"text": [f"document {i}" for i in range(300)]}), 100),
}


class Handler(http.server.BaseHTTPRequestHandler):
    """/ranges/, /whole/, /dated/, /chunked/, /unknown/ (ranges of an unknown length), /moved/,
    /closed/, /broken/ and a file's name.
    """

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        how, *_, name = self.path.split("?")[0].strip("/").split("/")
        self.server.asked.append((self.command, self.path, self.headers.get("Accept-Encoding")))
        if how in ("closed", "broken") or name not in FILES:
            return self.send_error({"closed": 403, "broken": 500}.get(how, 404))
        data, headers, code = FILES[name], {}, 200
        if how == "moved":
            data, headers, code = b"", {"Location": f"/ranges/{name}"}, 302
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if how == "ranges":
            headers["ETag"] = self.server.etag
        if how == "dated":
            headers["Last-Modified"] = "Tue, 01 Oct 2024 00:00:00 GMT"
        if how in ("ranges", "dated") and span and int(span[1]) >= len(data):
            headers["Content-Range"], data, code = f"bytes */{len(data)}", b"", 416
        if how in ("ranges", "dated", "unknown") and span and code == 200:
            first, last = int(span[1]), min(int(span[2]), len(data) - 1)
            total = "*" if how == "unknown" else len(data)
            headers["Content-Range"] = f"bytes {first}-{last}/{total}"
            data, code = data[first : last + 1], 206
        if how == "chunked":
            headers["Transfer-Encoding"] = "chunked"
            data = (b"%x\r\n%s\r\n" % (len(data), data) if data else b"") + b"0\r\n\r\n"
        else:
            headers["Content-Length"] = str(len(data))
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)
        return None

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def web():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.etag = [], '"one"'
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    thread.join()


def texts(uri):
    source = DataSource(path=uri)
    return [d.text for d in read_documents(uri, file=0, name="n", settings=source)]


@pytest.mark.parametrize(
    "path",
    [
        "ranges/a.jsonl",
        "ranges/a.jsonl.gz",
        "whole/a.jsonl",
        "moved/a.jsonl.gz",
        "chunked/a.jsonl",
        "chunked/a.jsonl.gz",
        "dated/a.jsonl",
        "unknown/a.jsonl",
        "ranges/a.jsonl?token=a/b.c&x=1",
    ],
)
def test_files_that_are_read(web, path):
    uri = f"{web.url}/{path}"
    [found] = list_files([uri], [".jsonl"])
    name = path.split("/", 1)[1]
    assert found.uri.split("#")[0] == uri and found.name == name.rsplit("/", 1)[-1]
    assert found.size_bytes == len(FILES[name.split("?")[0]])
    assert texts(found.uri) == [f"document {i}" for i in range(300)]


def test_a_stamp_only_where_the_server_gives_one(web):
    def stamps(path):
        return {list_files([f"{web.url}/{path}"], [])[0].stamp for _ in range(2)}

    assert stamps("ranges/a.jsonl") == {'"one"'}
    assert len(stamps("whole/a.jsonl")) == 2


@pytest.mark.parametrize(
    ("how", "requests"), [("ranges", 4), ("whole", 1), ("chunked", 1), ("unknown", 2)]
)
def test_a_large_file_is_fetched_once(web, how, requests):
    web.asked.clear()
    with open_read(f"{web.url}/{how}/large.txt") as file:
        assert b"".join(iter(lambda: file.read(1 << 20), b"")) == LARGE
    gets = [encoding for command, _, encoding in web.asked if command == "GET"]
    assert gets == ["identity"] * requests


@pytest.mark.parametrize("how", ["ranges", "whole", "chunked", "dated"])
def test_parquet_and_empty_files(web, how):
    uris = [f"{web.url}/{how}/{name}" for name in ("a.parquet", "empty.txt")]
    empty, parquet = sorted(list_files(uris, []), key=lambda file: file.size_bytes)
    assert (empty.size_bytes, parquet.size_bytes) == (0, len(FILES["a.parquet"]))
    with open_read(empty.uri) as file:
        assert file.read() == b""
    web.asked.clear()
    assert texts(parquet.uri) == [f"document {i}" for i in range(300)]
    assert {encoding for _, _, encoding in web.asked} == {"identity"}


def test_digests_and_units_are_those_of_the_same_files_on_disk(web, tmp_path):
    """Of Parquet by a server with ranges, which is cut by row groups, and one without."""
    store = Store(str(tmp_path / "store"))
    (tmp_path / "a.parquet").write_bytes(FILES["a.parquet"])

    def opened(path):
        source = DataSource(path=path)
        return open_inputs(store, source, list_source(source), 100)

    local, *remote = [
        opened(path)
        for path in (str(tmp_path), f"{web.url}/ranges/a.parquet", f"{web.url}/whole/a.parquet")
    ]
    wanted = [task.fingerprint for task in scan_tasks(local)]
    assert len(wanted) == 3
    assert [[task.fingerprint for task in scan_tasks(one)] for one in remote] == [wanted] * 2
    assert {one.identity() for one in remote} == {local.identity()}


def test_a_file_that_changes_is_noticed(web, tmp_path, monkeypatch):
    """By the etag between listing and reading, and while it is read; without one by its length."""
    store = Store(str(tmp_path / "store"))
    uris = [f"{web.url}/{how}" for how in ("ranges/large.txt", "whole/a.jsonl")]
    small, large = list_files(uris, [])
    before = digest_files(store, [large])
    with open_read(large.uri) as file:
        assert file.read(1 << 20) == LARGE[: 1 << 20]
        monkeypatch.setattr(web, "etag", '"two"')
        with pytest.raises(
            InputError, match=r'large.txt changed .*"one" became "two"\): run again'
        ):
            file.read()
    with pytest.raises(InputError, match=r'"one" became "two"'):
        texts(large.uri)
    monkeypatch.setitem(FILES, "large.txt", LARGE[::-1])
    [again] = list_files([f"{web.url}/ranges/large.txt"], [])
    assert digest_files(store, [again]) != before
    monkeypatch.setitem(FILES, "a.jsonl", LINES + b"{}\n")
    with pytest.raises(InputError, match=f"{len(LINES)} bytes became {len(LINES) + 3} bytes"):
        texts(small.uri)


def test_keys_in_the_path_of_a_url(web):
    assert folder_keys(f"{web.url}/ranges/lang=en/a.jsonl?x=1/y=2") == {"lang": "en"}
    assert texts(f"{web.url}/ranges/lang=en/a.jsonl") == [f"document {i}" for i in range(300)]


def test_files_that_are_refused(web):
    for path, word in {
        "ranges/nothing.jsonl": "not found: the server answers 404",
        "closed/a.jsonl": "the server answers 403",
    }.items():
        with pytest.raises(InputError, match=rf"{web.url}/{path}: .*{word}"):
            list_files([f"{web.url}/{path}"], [])


@pytest.mark.soak  # until the retries are over
def test_a_server_in_trouble_is_a_storage_fault(web):
    with pytest.raises(StorageError, match="500"):
        list_files([f"{web.url}/broken/a.jsonl"], [])
