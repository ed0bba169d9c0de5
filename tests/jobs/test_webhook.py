"""`on_failure`: a real receiver is told what ended a run, by its driver's parent."""

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from stillhouse.errors import SpecError
from stillhouse.jobs import webhook
from stillhouse.jobs.spec_file import parse_spec

VARIABLE = "NIGHT_WATCH"


@contextmanager
def receiver(*answers):
    """Its address, and the bodies that it got; it answers with these codes, then with 200."""
    got, left = [], list(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            got.append((self.path, self.headers["Content-Type"], json.loads(body)))
            self.send_response(left.pop(0) if left else 200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/secret-path", got
    server.shutdown()
    server.server_close()


def spec_file(folder, **changes):
    content = {
        "job": "select",
        "name": "nightly",
        "store": str(folder / "store"),
        "pool": {"path": str(folder / "nowhere/*.parquet")},
        "target": {"path": str(folder / "nowhere/*.parquet")},
        "tokenizer": {"train": {}},
        "selection": {"tau": 2},
        "on_failure": {"webhook_env": VARIABLE},
    }
    path = folder / "spec.yaml"
    path.write_text(json.dumps(content | changes))
    return path


def run(path, address):
    environment = os.environ | ({VARIABLE: address} if address else {})
    command = [sys.executable, "-m", "stillhouse.jobs.cli", "run", str(path)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_a_failed_run_is_told_once(tmp_path):
    with receiver() as (address, got):
        done = run(spec_file(tmp_path), address)
    [(path, kind, body)] = got
    assert (done.returncode, path, kind) == (3, "/secret-path", "application/json")
    assert {body["job"], body["name"], body["exit_code"]} == {"select", "nightly", 3}
    assert f"error: {body['error']}" in done.stderr and "nowhere" in body["error"]
    assert body["text"].startswith("Stillhouse: nightly ended with exit code 3 (bad input data). ")
    assert (body["store"], body["run"]) == (str(tmp_path / "store"), None)
    assert "secret-path" not in done.stderr + done.stdout + (tmp_path / "spec.yaml").read_text()


@pytest.mark.parametrize(
    ("answers", "count", "said"),
    [
        ((500, 503), 3, ""),
        ((500, 500, 500), 3, f"the webhook of {VARIABLE} was not told: it answers 500"),
        ((404,), 1, f"the webhook of {VARIABLE} was not told: it answers 404"),
    ],
)
def test_a_webhook_that_fails_costs_a_warning(capsys, monkeypatch, answers, count, said):
    monkeypatch.setattr(webhook, "_PAUSE_S", 0.01)
    told = {"variable": VARIABLE, "job": "mix", "name": None, "store": "s"}
    with receiver(*answers) as (address, got):
        monkeypatch.setenv(VARIABLE, address)
        webhook.post_failure(told, 1, "KeyError: 'a'\nmore", "s/runs/1")
    assert len(got) == count
    assert (
        got[0][2]["text"] == "Stillhouse: job: mix ended with exit code 1 (an error). KeyError: 'a'"
    )
    errors = capsys.readouterr().err
    assert said in errors and bool(said) == bool(errors) and "secret" not in errors


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("", f"{VARIABLE} is not set: nobody will be told"),
        ("slack.example/secret", f"{VARIABLE} holds no http(s) address"),
        ("http://127.0.0.1:1/secret", f"the webhook of {VARIABLE} was not told: "),
    ],
)
def test_the_exit_code_stays_whatever_the_webhook_does(tmp_path, address, said):
    done = run(spec_file(tmp_path), address)
    assert (done.returncode, f"warning: on_failure: {said}" in done.stderr) == (3, True)
    assert "secret" not in done.stderr


KILLED = """
import os, signal
from stillhouse.jobs import process

signal.signal(signal.SIGINT, signal.default_int_handler)  # tests may run with it ignored
process.supervise()
told = {"variable": "NIGHT_WATCH", "job": "train", "name": "target", "store": "s"}
process.tell_parent(told=told)
print(os.getpid(), flush=True)
signal.pause()
"""


@pytest.mark.parametrize(("number", "told"), [(signal.SIGKILL, True), (signal.SIGINT, False)])
def test_a_killed_driver_is_told_and_ctrl_c_is_not(number, told):
    with receiver() as (address, got):
        driver = subprocess.Popen(
            [sys.executable, "-c", KILLED],
            env=os.environ | {VARIABLE: address},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        child = int(driver.stdout.readline())
        os.kill(child if told else driver.pid, number)
        driver.communicate(timeout=60)
    assert (driver.returncode, len(got)) == (4, int(told))
    if told:
        assert "was killed (SIGKILL: out of memory?)" in got[0][2]["error"]


def test_an_address_in_a_spec_is_refused(tmp_path):
    content = json.loads(spec_file(tmp_path).read_text())
    content["on_failure"] = {"webhook_env": "https://hooks.example/T0/secret"}
    with pytest.raises(SpecError, match=r"on_failure\.webhook_env"):
        parse_spec(content, "spec.yaml")
