"""OpenAI-compatible servers on loopback: a template that can fail, and a real small model."""

import json
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.request import urlopen

from generation.stand_in import StandIn, number

from stillhouse.generation.asking import Ask

KEY = "sk-loopback-only"


class TemplateServer(ThreadingHTTPServer):
    """Answers chat completions by the stand-in of its model's name; a thread a request.

    Attributes:
        fail_one_in: every so many-th request is answered with 503; 0 for none.
        status: of every answer instead of 200.
        delay_s: before every answer.
        gate: as many first requests as it has parties are answered once all of them are there.
        silent: answers have no text.
        asked: calls answered, `most` at once.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.fail_one_in, self.status, self.delay_s, self.silent = 0, 200, 0.0, False
        self.lock, self.now, self.most, self.count, self.asked = threading.Lock(), 0, 0, 0, 0
        self.keys, self.gate = set(), None

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server, size = self.server, int(self.headers["Content-Length"])
        body = json.loads(self.rfile.read(size))
        with server.lock:
            server.now, server.count = server.now + 1, server.count + 1
            server.most, count = max(server.most, server.now), server.count
            server.keys.add(self.headers.get("Authorization"))
        try:
            if server.gate is not None and count <= server.gate.parties:
                server.gate.wait(timeout=60)
            time.sleep(server.delay_s)
            self._answer(body, count)
        finally:
            with server.lock:
                server.now -= 1

    def _answer(self, body, count):
        server = self.server
        failed = server.fail_one_in and count % server.fail_one_in == 0
        status = 503 if failed else server.status
        if self.path != "/v1/chat/completions":
            status = 404
        if status != 200:
            self._send(status, {"error": {"message": f"status {status}", "type": "test"}})
            return
        prompt = body["messages"][-1]["content"]
        ask = Ask("strong", prompt, None, body["temperature"], body["max_tokens"], body["seed"])
        text = "" if server.silent else StandIn(body["model"]).reply(ask)
        with server.lock:
            server.asked += 1
        message = {"role": "assistant", "content": text}
        usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": len(text.split())}
        usage["total_tokens"] = sum(usage.values())
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        found = {"id": f"c{number(prompt)}", "object": "chat.completion", "created": 0}
        self._send(200, found | {"model": body["model"], "choices": [choice], "usage": usage})

    def _send(self, status, content):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@contextmanager
def template_server():
    """A running `TemplateServer`."""
    server = TemplateServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def served(folder, log):
    """The URL of a server of transformers with the model in a folder."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with open(log, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        for _ in range(600):
            try:
                with urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                    break
            except OSError:
                assert process.poll() is None, log.read_text()[-2000:]
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()
