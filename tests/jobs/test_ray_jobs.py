"""Reaching a cluster's dashboard: addresses, tokens, and servers that are none."""

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import ray

from stillhouse.errors import ClusterError
from stillhouse.jobs.ray_jobs import Cluster, dashboard_url, token


@pytest.fixture(autouse=True)
def plain(monkeypatch, tmp_path):
    """No address and no token from this machine."""
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


class Server(ThreadingHTTPServer):
    """Answers every GET with `reply`: status and JSON. Keeps the Authorization headers."""

    reply: tuple[int, object] = (404, None)

    def __init__(self):
        self.tokens = []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.tokens.append(self.headers.get("Authorization"))
        status, content = self.server.reply
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("http://head:8265/", "http://head:8265"),
        ("https://ray.example", "https://ray.example"),
        ("head:8265", "http://head:8265"),
    ],
)
def test_addresses(given, url):
    assert dashboard_url(given) == url


def test_address_of_the_environment(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://a:1")
    assert dashboard_url(None) == "http://a:1"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://b:1")
    assert dashboard_url(None) == "http://b:1"
    assert dashboard_url("c:1") == "http://c:1"


@pytest.mark.parametrize("given", [None, "", "auto", "ray://head:10001"])
def test_no_address(given):
    with pytest.raises(ClusterError, match="is no dashboard: give --address http://HOST:8265"):
        dashboard_url(given)


def test_token_comes_from_the_standard_places(monkeypatch, tmp_path):
    assert token() is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("of-home\n")
    assert token() == ("of-home", str(tmp_path / ".ray" / "auth_token"))
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "other"))
    with pytest.raises(ClusterError, match=r"RAY_AUTH_TOKEN_PATH: .*other: No such file"):
        token()
    (tmp_path / "other").write_text("of-a-file")
    assert token() == ("of-a-file", str(tmp_path / "other"))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of-the-environment")
    assert token() == ("of-the-environment", "RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "tökén")
    with pytest.raises(ClusterError, match="from RAY_AUTH_TOKEN has characters that no token"):
        token()


def test_nothing_answers():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    with pytest.raises(ClusterError, match=f"no Ray cluster answers at http://127.0.0.1:{port}"):
        Cluster(f"127.0.0.1:{port}")


def test_no_token_and_a_wrong_one(server, monkeypatch):
    server.reply = (401, "Unauthorized")
    with pytest.raises(ClusterError, match="wants a token and there is none here: set RAY_AUTH"):
        Cluster(server.url)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong-secret")
    server.reply = (403, "Forbidden")
    with pytest.raises(ClusterError, match="refuses the token from RAY_AUTH_TOKEN") as refused:
        Cluster(server.url)
    assert "wrong-secret" not in str(refused.value)
    assert server.tokens == [None, "Bearer wrong-secret"]


def test_another_ray(server):
    server.reply = (200, {"ray_version": "2.9.3"})
    with pytest.raises(ClusterError, match=f"runs Ray 2.9.3, this machine Ray {ray.__version__}"):
        Cluster(server.url)


@pytest.mark.parametrize("reply", [(404, None), (500, "x")])
def test_another_server(server, reply):
    server.reply = reply
    with pytest.raises(ClusterError, match=f"is no Ray dashboard: /api/version gives {reply[0]}"):
        Cluster(server.url)


def test_connecting_leaves_the_environment_alone(server, monkeypatch):
    """A patch version more is no other Ray; Ray's own client asks the server again, not the one
    that the environment names."""
    import os

    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    server.reply = (200, {"ray_version": ".".join([*ray.__version__.split(".")[:2], "99"])})
    assert Cluster(server.url).url == server.url
    assert len(server.tokens) >= 2
    assert os.environ["RAY_ADDRESS"] == "http://127.0.0.1:1"
    assert "RAY_API_SERVER_ADDRESS" not in os.environ
