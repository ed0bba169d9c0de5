"""An HTTP proxy in front of an S3 server that counts requests and answers some of them badly."""

import http.client
import socket
import struct
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

# What a rule may return for a request; None lets it through.
_ANSWERS = {
    "500": (500, "InternalError"),
    "503": (503, "SlowDown"),
    "403": (403, "AccessDenied"),
    "expired": (400, "ExpiredToken"),
    "region": (400, "AuthorizationHeaderMalformed"),  # signed for another one
}
FAULTS = (*_ANSWERS, "reset", "truncate", "lose answer", "stall")
_STALL_S = 30
_HOP = {"connection", "transfer-encoding", "content-length", "date", "server"}


Fault = str | threading.Event | None


class FaultProxy:
    """Listens on loopback from `with` on. `rule(n, method, path)` decides over the n-th request.

    It gives the name of a fault, None to let it through, or an event to hold it up until then.
    """

    def __init__(self, target: str, rule: Callable[[int, str, str], Fault] | None = None):
        self.target = urlsplit(target)
        self.rule = rule or (lambda n, method, path: None)
        self.requests: list[tuple[str, str]] = []
        self.faults: list[str] = []
        self.lock = threading.Lock()
        self.closing = threading.Event()
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "FaultProxy":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def decide(self, method: str, path: str) -> Fault:
        with self.lock:
            fault = self.rule(len(self.requests), method, path)
            self.requests.append((method, path))
            self.faults += [fault] if isinstance(fault, str) else []
        return fault

    def passed_on(self, sent: int, received: int) -> None:
        """Called with the bytes to and from the server, of each request that reached it."""


class _Handler(BaseHTTPRequestHandler):
    proxy: FaultProxy
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.proxy.decide(self.command, self.path)
        if isinstance(fault, threading.Event):
            fault.wait(60)
            self._pass_on(body, None)
        elif fault == "reset":
            self._reset()
        elif fault == "stall":
            self.proxy.closing.wait(_STALL_S)
            self._reset()
        elif fault in _ANSWERS:
            self._refuse(*_ANSWERS[fault])
        else:
            self._pass_on(body, fault)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer

    def _pass_on(self, body: bytes, fault: str | None) -> None:
        target = self.proxy.target
        connection = http.client.HTTPConnection(target.hostname, target.port)
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        self.proxy.passed_on(len(body), len(data))
        if fault == "lose answer":
            self._reset()
            return
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in _HOP:
                self.send_header(name, value)
        length = answer.headers.get("Content-Length", "0")
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(data)))
        self.end_headers()
        if fault == "truncate":
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        else:
            self.wfile.write(data)

    def _refuse(self, status: int, code: str) -> None:
        text = f"<Error><Code>{code}</Code><Message>{code} by the proxy</Message></Error>"
        data = b"" if self.command == "HEAD" else text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def handle(self) -> None:
        try:
            super().handle()
        except (OSError, ValueError):
            return

    def finish(self) -> None:
        try:
            super().finish()
        except (OSError, ValueError):
            return

    def log_message(self, *_) -> None:
        return
