"""What `submit` does before a cluster answers, and what it sends; tests/faults has a real one."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path

import pytest
import ray
import yaml
from small import parse, small_spec, write_shard

from stillhouse.distillation.spec import DistillSpec
from stillhouse.errors import ClusterError, InputError, SpecError
from stillhouse.jobs.ray_jobs import Cluster, dashboard_url, token
from stillhouse.jobs.submit import (
    MAX_BYTES,
    check_reach,
    check_size,
    code_files,
    library_versions,
    own_code,
    submission_name,
    version_differences,
    write_package,
)
from stillhouse.mixing.spec import MixSpec
from stillhouse.spec import SelectSpec
from stillhouse.storage.artifact import Store
from stillhouse.storage.names import Publication, publish_run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def place(world, tmp_path):
    for name in ("pool", "target"):
        shutil.copytree(world / name, tmp_path / name)
    return tmp_path


def name_of(spec):
    return submission_name(spec, check_reach(spec))


def test_one_job_has_one_name_however_wide_it_runs(place):
    name = name_of(parse(place))
    assert len(name) == 64
    assert name_of(parse(place, compute={"scorers": 9}, name="again")) == name
    others = [{"selection": {"tau": 9}}, {"store": str(place / "other")}, {"publish": "books"}]
    names = {name_of(parse(place, **changes)) for changes in others}
    assert len(names | {name}) == 4
    write_shard(place, 9, per_shard=8)
    assert name_of(parse(place)) != name
    # what can be listed is enough; the content is the cluster's to read
    (place / "pool" / "pool-00.parquet").write_bytes(b"no parquet")
    assert len(name_of(parse(place))) == 64
    assert {path.name for path in (place / "store").iterdir()} == {"store.json"}


def test_what_cannot_be_reached(place):
    with pytest.raises(InputError, match="no files match"):
        check_reach(parse(place, pool={"path": str(place / "nothing")}))
    spec = parse(place, publish="books")
    check_reach(spec)
    other = Publication("s", "r", {"job": "other"}, "2026-11-01T00:00:00+00:00")
    publish_run(Store(spec.store).uri, "books", other)
    with pytest.raises(SpecError, match="`publish: books` is in use by another spec"):
        check_reach(spec)


@pytest.fixture
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
def server(plain):
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def test_addresses(plain, monkeypatch):
    assert dashboard_url("http://head:8265/") == "http://head:8265"
    assert dashboard_url("https://ray.example") == "https://ray.example"
    assert dashboard_url("head:8265") == "http://head:8265"
    for given in (None, "", "auto", "ray://head:10001"):
        with pytest.raises(ClusterError, match="is no dashboard: give --address http://HOST:8265"):
            dashboard_url(given)
    monkeypatch.setenv("RAY_ADDRESS", "http://a:1")
    assert dashboard_url(None) == "http://a:1"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://b:1")
    assert dashboard_url(None) == "http://b:1"
    assert dashboard_url("c:1") == "http://c:1"


def test_the_token_comes_from_the_standard_places(plain, monkeypatch, tmp_path):
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


def test_no_cluster(place, plain, reports):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    path = place / "spec.yaml"
    path.write_text(yaml.safe_dump(small_spec(place)))
    code, found = reports("submit", str(path), "--address", url, "--follow")
    assert (code, f"no Ray cluster answers at {url}" in found["error"]) == (2, True)
    code, found = reports("submit", str(path))
    assert (code, "give --address http://HOST:8265" in found["error"]) == (2, True)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((200, {"ray_version": "2.9.3"}), f"runs Ray 2.9.3, this machine Ray {ray.__version__}"),
        ((404, None), "is no Ray dashboard: /api/version gives 404"),
        ((500, "x"), "is no Ray dashboard: /api/version gives 500"),
        ((401, "Unauthorized"), "wants a token and there is none here: set RAY_AUTH"),
    ],
)
def test_servers_that_are_no_cluster_of_ours(server, reply, message):
    server.reply = reply
    with pytest.raises(ClusterError, match=message):
        Cluster(server.url)


def test_a_wrong_token(server, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong-secret")
    server.reply = (403, "Forbidden")
    with pytest.raises(ClusterError, match="refuses the token from RAY_AUTH_TOKEN") as refused:
        Cluster(server.url)
    assert "wrong-secret" not in str(refused.value)
    assert server.tokens == ["Bearer wrong-secret"]


def test_connecting_leaves_the_environment_alone(server, monkeypatch):
    """Another patch version of Ray is accepted; Ray's client asks the server at the given address,
    not the one that the environment names.
    """
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    server.reply = (200, {"ray_version": ".".join([*ray.__version__.split(".")[:2], "99"])})
    assert Cluster(server.url).url == server.url
    assert len(server.tokens) >= 2
    assert os.environ["RAY_ADDRESS"] == "http://127.0.0.1:1"
    assert "RAY_API_SERVER_ADDRESS" not in os.environ


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A package of the small spec, and what it holds once it is unpacked."""
    folder = tmp_path_factory.mktemp("package")
    archive = tmp_path_factory.mktemp("sent") / "job.zip"
    spec = parse(Path("/data"), compute={"address": "auto", "scorers": 3})
    size = write_package(archive, spec)
    assert size == archive.stat().st_size < 1_000_000
    shutil.unpack_archive(archive, folder)
    return folder, archive, spec


def test_a_package_holds_code_spec_and_versions(package, tmp_path):
    folder, archive, spec = package
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files >= {
        "stillhouse/jobs/cli.py",
        "stillhouse/pipelines/context.py",
        "stillhouse/actors/pool_worker.py",
        "stillhouse/report/style.css",
        "stillhouse/report/page.html.j2",
    }
    tops = {name.split("/")[0] for name in files}
    assert tops == {"stillhouse", "spec.yaml", "versions.json"}
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    shipped = SelectSpec.model_validate(yaml.safe_load((folder / "spec.yaml").read_text()))
    assert (shipped.compute.address, shipped.compute.scorers) == (None, 3)
    assert shipped == spec.model_copy(update={"compute": shipped.compute})
    write_package(tmp_path / "again.zip", spec)
    assert (tmp_path / "again.zip").read_bytes() == archive.read_bytes()


def test_a_submitted_job_runs_the_code_that_was_sent(package):
    """The folder's own modules; a spec with a mistake, so that no Ray starts."""
    folder, _, _ = package
    (folder / "stillhouse" / "jobs" / "__init__.py").write_text("print('sent')\n")
    (folder / "spec.yaml").write_text("job: select\nselect: 1\n")
    (folder / "versions.json").write_text('{"numpy": "1.0", "pyarrow": "0.1"}')
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-m", "stillhouse.jobs.cli", "run", "spec.yaml"],
        cwd=folder,
        env=environment | {"STILLHOUSE_SUBMISSION": "id-1"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "sent\n")
    assert "unknown key `select`" in done.stderr
    assert (
        f"warning: the cluster's image has numpy {version('numpy')} (tested with 1.0), "
        f"pyarrow {version('pyarrow')} (tested with 0.1)"
    ) in done.stderr


def test_versions_are_those_of_the_constraints_or_the_installed_ones(tmp_path):
    here = {name: version(name) for name in ("ray", "torch", "numpy", "s3fs", "pyyaml")}
    assert library_versions(tmp_path).items() >= here.items()
    assert not {"pytest", "gcsfs", "stillhouse"} & set(library_versions(tmp_path))
    (tmp_path / "constraints.txt").write_text("# x\nnumpy==1.0\npytest==2.0\n")
    tested = library_versions(tmp_path)
    assert (tested["numpy"], "pytest" in tested) == ("1.0", False)
    assert version_differences(here | {"numpy": version("numpy") + "+cu130"}) == []
    assert version_differences({"torch": "1.0", "no-such-library": "2.0"}) == [
        f"torch {version('torch')} (tested with 1.0)",
        "no-such-library missing (tested with 2.0)",
    ]


def test_data_are_not_sent(tmp_path):
    """Only sources are taken; where these are too large, the largest is named."""
    (tmp_path / "jobs" / "__pycache__").mkdir(parents=True)
    for name in ("a.py", "data.parquet", "__pycache__/a.pyc", ".venv"):
        (tmp_path / "jobs" / name).write_bytes(b"x")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "jobs").symlink_to("../jobs")
    assert code_files(tmp_path / "package") == {"package/jobs/a.py": b"x"}
    check_size({"a": b"x" * MAX_BYTES})
    with pytest.raises(SpecError, match=r"4,000,001 bytes .* file is jobs/b.py .4,000,000 bytes"):
        check_size({"jobs/a.py": b"x", "jobs/b.py": b"x" * MAX_BYTES})


NET = """
import torch.nn as nn
from functools import partial

def make(num_channels, image_size, num_classes):
    return nn.Flatten()

small = partial(make)
"""


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """The working directory, with a package of networks and a module of them."""
    (tmp_path / "h7_nets").mkdir()
    for file in ("h7_nets/wide.py", "h7_nets/blocks.py", "h7_flat.py", "other.py"):
        (tmp_path / file).write_text(NET)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def distil(**changes):
    content = {"job": "distill", "store": "/s", "data": {"dataset": "digits"}, **changes}
    return DistillSpec.model_validate({"method": {"name": "mtt", "images_per_class": 1}} | content)


def factory(name):
    return {"name": "factory", "factory": name}


def test_networks_of_the_users_are_sent(in_folder):
    asked = distil(
        network=factory("h7_nets.wide:make"),
        evaluate={"networks": [factory("h7_flat:small"), factory("h7_nets.wide:make")]},
    )
    write_package(in_folder / "job.zip", asked)
    shutil.unpack_archive(in_folder / "job.zip", in_folder / "sent")
    sent = {p.relative_to(in_folder / "sent").as_posix() for p in in_folder.glob("sent/**/*.py")}
    own = {path for path in sent if path.split("/")[0] != "stillhouse"}
    assert own == {"h7_nets/wide.py", "h7_nets/blocks.py", "h7_flat.py"}
    teacher = {"name": "sre2l", "images_per_class": 1}
    taught = distil(method=teacher, teachers=[factory("h7_flat:nn")])
    assert [code.name for code in own_code(taught)] == ["h7_flat:nn"]
    before = [code.digest for code in own_code(asked)]
    (in_folder / "h7_flat.py").write_text(NET + "# changed")
    assert [code.digest for code in own_code(asked)] != before
    with pytest.raises(SpecError, match=r"`factory: h7_none:make`: there is no module `h7_none`"):
        own_code(distil(network=factory("h7_none:make")))
    with pytest.raises(SpecError, match=r"`factory: h7_flat:wide`: the module has no `wide`"):
        own_code(distil(network=factory("h7_flat:wide")))
    assert own_code(distil(network=factory("torch.nn:Linear"))) == []  # installed there too


@pytest.mark.parametrize(
    ("policy", "files"),
    [("exp3", []), ("uniform", []), ("greedy_policy:Greedy", ["greedy_policy.py"])],
)
def test_only_a_policy_of_the_users_is_sent(monkeypatch, policy, files):
    monkeypatch.chdir(ROOT / "examples" / "extend")
    arm = {"path": "arms.parquet", "by": "task"}
    target = {"path": "target.parquet", "num_shots": 16}
    spec = MixSpec.model_validate(
        {"job": "mix", "target": target, "auxiliary": [arm], "policy": {"name": policy}}
    )
    assert [path for code in own_code(spec) for path, _ in code.files] == files
