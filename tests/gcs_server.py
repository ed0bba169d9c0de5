"""A small server of Google Cloud Storage's JSON API, with its preconditions: what gcsfs asks of it.

The emulators in the package index ignore `ifGenerationMatch`, and create-only writes are what a
store is built on.
"""

import json
import re
import threading
from base64 import b64encode
from dataclasses import dataclass, field
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Bucket:
    """Objects by name: their bytes and generation."""

    objects: dict[str, tuple[bytes, int]] = field(default_factory=dict)


class GcsServer:
    """Listens on loopback from `with` on; `page` is the number of names in a listing's answer.

    While it is `refusing`, it lets nobody in.
    """

    def __init__(self, page: int = 100) -> None:
        self.buckets: dict[str, Bucket] = {}
        self.uploads: dict[str, tuple[str, str, dict[str, str], bytearray]] = {}
        self.refusing = False
        self.lock, self.numbers, self.page = threading.Lock(), count(1), page
        handler = type("Handler", (_Handler,), {"server_": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "GcsServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def put(self, bucket: str, name: str, data: bytes, query: dict[str, str]) -> dict | int:
        """Create or replace an object; its metadata, or the status of a failure."""
        with self.lock:
            if self.refusing:
                return 403
            if bucket not in self.buckets:
                return 404
            objects = self.buckets[bucket].objects
            wanted = query.get("ifGenerationMatch")
            there = objects[name][1] if name in objects else 0
            if wanted is not None and int(wanted) != there:
                return 412
            objects[name] = data, next(self.numbers)
            return self.about(bucket, name)

    def about(self, bucket: str, name: str) -> dict:
        data, generation = self.buckets[bucket].objects[name]
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": name,
            "size": str(len(data)),
            "generation": str(generation),
            "etag": f"etag{generation}",
            "md5Hash": b64encode(md5(data).digest()).decode(),
            "updated": "2026-01-01T00:00:00.000Z",
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "contentType": "application/octet-stream",
        }

    def list(self, bucket: str, query: dict[str, str]) -> dict:
        """A page of objects and of prefixes up to the delimiter."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        found: dict[str, str] = {}
        for name in sorted(self.buckets[bucket].objects):
            if not name.startswith(prefix):
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                found[prefix + rest.split(delimiter)[0] + delimiter] = "prefix"
            else:
                found[name] = "object"
        start = int(query.get("pageToken", 0))
        page = [*found.items()][start : start + self.page]
        answer: dict = {
            "kind": "storage#objects",
            "items": [self.about(bucket, n) for n, kind in page if kind == "object"],
            "prefixes": [n for n, kind in page if kind == "prefix"],
        }
        if start + self.page < len(found):
            answer["nextPageToken"] = str(start + self.page)
        return answer


class _Handler(BaseHTTPRequestHandler):
    server_: GcsServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path, query, _ = self._read()
        bucket, name = _place(path)
        if bucket not in self.server_.buckets:
            return self._answer(404)
        if name is None:
            listed = path.endswith("/o")
            return self._answer(200, self.server_.list(bucket, query) if listed else {})
        objects = self.server_.buckets[bucket].objects
        if name not in objects:
            return self._answer(404)
        if query.get("alt") != "media":
            return self._answer(200, self.server_.about(bucket, name))
        data = objects[name][0]
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self._answer(200, data)
        first, last = wanted.groups()
        start = int(first) if first else max(0, len(data) - int(last))
        stop = int(last) + 1 if first and last else len(data)
        if start >= len(data):
            return self._answer(416)
        return self._answer(206, data[start:stop])

    def do_POST(self) -> None:
        path, query, body = self._read()
        bucket, name = _place(path)
        if path.startswith("/batch"):
            return self._batch(body)
        if "upload_id" in query:
            return self._chunk(query, body)
        if query.get("uploadType") == "multipart":
            boundary = b"--" + self.headers["Content-Type"].split('"')[1].encode()
            _, about, content, _ = body.split(boundary, 3)
            name = json.loads(about.split(b"\n\n", 1)[1])["name"]
            data = content.split(b"\n\n", 1)[1][:-1]
            return self._put(bucket, name, data, query)
        if query.get("uploadType") == "resumable":
            number = str(next(self.server_.numbers))
            name = query.get("name") or json.loads(body)["name"]
            self.server_.uploads[number] = bucket, name, query, bytearray()
            place = f"{self.server_.url}/upload/storage/v1/b/{bucket}/o?upload_id={number:0>20}"
            return self._answer(200, {}, Location=place)
        return self._answer(400)

    def do_PUT(self) -> None:
        _, query, body = self._read()
        self._chunk(query, body)

    def _chunk(self, query: dict[str, str], body: bytes) -> None:
        """A piece of a large object, which appears with its last one."""
        bucket, name, asked, data = self.server_.uploads[query["upload_id"].lstrip("0")]
        data += body
        if self.headers.get("Content-Range", "").endswith("/*"):
            return self._answer(308, b"", Range=f"bytes=0-{len(data) - 1}")
        return self._put(bucket, name, bytes(data), asked)

    def do_DELETE(self) -> None:
        path, _, _ = self._read()
        self._answer(self._delete(path))

    def _delete(self, path: str) -> int:
        bucket, name = _place(path)
        found = self.server_.buckets[bucket].objects.pop(name, None)
        return 204 if found else 404

    def _batch(self, body: bytes) -> None:
        answers = []
        for number, path in enumerate(re.findall(rb"DELETE (\S+) HTTP", body), 1):
            status = self._delete(urlsplit(path.decode()).path)
            head = f"--end\r\nContent-Type: application/http\r\nContent-ID: <response-{number}>"
            answers.append(f"{head}\r\n\r\nHTTP/1.1 {status} Done\r\n\r\n\r\n")
        text = "".join(answers) + "--end--"
        self._answer(200, text.encode(), **{"Content-Type": "multipart/mixed; boundary=end"})

    def _put(self, bucket: str, name: str, data: bytes, query: dict[str, str]) -> None:
        made = self.server_.put(bucket, name, data, query)
        self._answer(made) if isinstance(made, int) else self._answer(200, made)

    def _read(self) -> tuple[str, dict[str, str], bytes]:
        parts = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        return parts.path, query, self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, status: int, content: dict | bytes = b"", **headers: str) -> None:
        if status >= 400:
            content = {"error": {"code": status, "message": f"status {status}"}}
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for key, value in ({"Content-Type": kind} | headers).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_) -> None:
        return


def _place(path: str) -> tuple[str, str | None]:
    """Bucket and object of `/.../b/BUCKET/o/OBJECT`."""
    found = re.search(r"/b/([^/]+)(?:/o(?:/(.+))?)?$", path)
    bucket, name = found.groups() if found else ("", None)
    return bucket, unquote(name) if name else None
