"""Files on web servers: one that knows ranges, one that does not, and what they say otherwise."""

import gzip
import http.server
import random
import re
import threading

import pytest

from stillhouse.data_settings import DataSource
from stillhouse.errors import InputError, StorageError
from stillhouse.storage.filesystem import list_files, open_read
from stillhouse.text.documents import read_documents

LINES = b"".join(b'{"text": "document %d"}\n' % i for i in range(300))
LARGE = random.Random(1).randbytes(9 << 20)
FILES = {"a.jsonl": LINES, "a.jsonl.gz": gzip.compress(LINES), "large.txt": LARGE}


class Handler(http.server.BaseHTTPRequestHandler):
    """/ranges/, /whole/, /chunked/, /moved/, /closed/, /broken/ and a file's name."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        how, name = self.path.split("?")[0].strip("/").split("/")
        self.server.asked.append((self.command, self.path, self.headers.get("Accept-Encoding")))
        if how in ("closed", "broken") or name not in FILES:
            return self.send_error({"closed": 403, "broken": 500}.get(how, 404))
        data, headers, code = FILES[name], {}, 200
        if how == "moved":
            data, headers, code = b"", {"Location": f"/ranges/{name}"}, 302
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if how == "ranges":
            headers["ETag"] = '"one"'
        if how == "ranges" and span:
            first, last = int(span[1]), min(int(span[2]), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, code = data[first : last + 1], 206
        if how == "chunked":
            headers["Transfer-Encoding"] = "chunked"
            data = b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data)
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
    server.asked = []
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
        "ranges/a.jsonl?token=a/b.c&x=1",
    ],
)
def test_files_that_are_read(web, path):
    uri = f"{web.url}/{path}"
    [found] = list_files([uri], [".jsonl"])
    name = path.split("/", 1)[1]
    assert (found.uri, found.name) == (uri, name.rsplit("/", 1)[-1])
    assert found.size_bytes == len(FILES[name.split("?")[0]])
    assert texts(found.uri) == [f"document {i}" for i in range(300)]


def test_a_stamp_only_where_the_server_gives_one(web):
    def stamps(path):
        return {list_files([f"{web.url}/{path}"], [])[0].stamp for _ in range(2)}

    assert stamps("ranges/a.jsonl") == {'"one"'}
    assert len(stamps("whole/a.jsonl")) == 2


@pytest.mark.parametrize(("how", "requests"), [("ranges", 3), ("whole", 1)])
def test_a_large_file_is_fetched_once(web, how, requests):
    web.asked.clear()
    with open_read(f"{web.url}/{how}/large.txt") as file:
        assert b"".join(iter(lambda: file.read(1 << 20), b"")) == LARGE
    gets = [encoding for command, _, encoding in web.asked if command == "GET"]
    assert gets == ["identity"] * requests


def test_files_that_are_refused(web):
    for path, word in {
        "ranges/nothing.jsonl": "not found: the server answers 404",
        "closed/a.jsonl": "the server answers 403",
        "chunked/a.jsonl": "does not say its length: download the file",
    }.items():
        with pytest.raises(InputError, match=rf"{web.url}/{path}: .*{word}"):
            list_files([f"{web.url}/{path}"], [])


@pytest.mark.soak  # until the retries are over
def test_a_server_in_trouble_is_a_storage_fault(web):
    with pytest.raises(StorageError, match="500"):
        list_files([f"{web.url}/broken/a.jsonl"], [])
