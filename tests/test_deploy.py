"""deploy/ and Dockerfile, held against what reads them: Kubernetes' schemas, PromQL, hadolint.

kubernetes-validate has the strict schemas of Kubernetes, promql-parser the real grammar and types
of Prometheus, hadolint the rules of Dockerfiles. All work offline.
"""

import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from itertools import combinations
from pathlib import Path

import promql_parser
import pytest
import yaml
from grafana_foundation_sdk.models.dashboard import Dashboard
from manifests import check_objects

import stillhouse
from jobs.schedule import Place, schedule
from jobs.spec_file import load_spec

ROOT = Path(__file__).parents[1]
KUBERNETES = ROOT / "deploy" / "kubernetes"
IMAGE = f"REGISTRY/stillhouse:{stillhouse.__version__}"
OURS = {
    "ray_stillhouse_parts_total",
    "ray_stillhouse_parts_expected",
    "ray_stillhouse_parts_in_flight",
    "ray_stillhouse_tokens_total",
    "ray_stillhouse_part_seconds_bucket",
    "ray_stillhouse_part_seconds_sum",
    "ray_stillhouse_data_wait_seconds_total",
    "ray_stillhouse_retries_total",
    "ray_stillhouse_dead_letters_total",
    "ray_stillhouse_bandit_entropy_nats",
}
RAYS = {
    "ray_node_gpus_utilization",
    "ray_node_cpu_count",
    "ray_cluster_active_nodes",
    "ray_cluster_pending_nodes",
    "ray_cluster_failed_nodes",
}


def load(name):
    return list(yaml.safe_load_all((KUBERNETES / name).read_text()))


def test_every_manifest_is_one_that_kubernetes_takes():
    kinds = {}
    for path in sorted(KUBERNETES.iterdir()):
        found = load(path.name)
        check_objects(found)
        kinds[path.name] = [one["kind"] for one in found]
    assert kinds == {
        "cronjob.yaml": ["ConfigMap", "CronJob"],
        "raycluster.yaml": ["RayCluster"],
        "raycronjob.yaml": ["ConfigMap", "RayCronJob"],
        "rayjob.yaml": ["ConfigMap", "RayJob"],
        "service-account.yaml": ["ServiceAccount"],
    }


@pytest.mark.parametrize(
    ("kind", "address"), [("raycronjob", None), ("cronjob", "http://stillhouse-head-svc:8265")]
)
def test_schedules_are_what_the_command_in_them_prints(kind, address):
    path = "examples/nightly.yaml"
    spec = load_spec(str(ROOT / path), [])
    text = schedule(path, spec, [], "0 3 * * *", kind, Place(address, IMAGE, "stillhouse"))
    written = (KUBERNETES / f"{kind}.yaml").read_text()
    comment = "".join(line for line in written.splitlines(True) if line.startswith("#"))
    assert written == comment + text
    said = " ".join(comment.replace("\\\n", "").replace("#", "").split())
    options = f"--image {IMAGE} --service-account stillhouse"
    options += f" --address {address}" if address else ""
    assert said.endswith(f'stillhouse schedule {path} --cron "0 3 * * *" --kind {kind} {options}')


def test_one_run_is_that_of_every_night():
    config, job = load("rayjob.yaml")
    nightly_config, nightly = load("raycronjob.yaml")
    assert config == nightly_config
    assert job["spec"] == nightly["spec"]["jobTemplate"]


def test_cluster_and_manifests_fit_each_other():
    cluster, account = load("raycluster.yaml")[0], load("service-account.yaml")[0]
    assert cluster["spec"]["rayVersion"] == version("ray")
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    for pod in (group["template"]["spec"] for group in groups):
        assert pod["serviceAccountName"] == account["metadata"]["name"]
        assert [container["image"] for container in pod["containers"]] == [IMAGE]
    job = load("cronjob.yaml")[1]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    container = job["containers"][0]
    assert f"http://{cluster['metadata']['name']}-head-svc:8265" in container["args"]
    secret = container["env"][0]["valueFrom"]["secretKeyRef"]
    assert secret == {"name": cluster["metadata"]["name"], "key": "auth_token"}


def dashboard():
    return json.loads((ROOT / "deploy" / "grafana" / "stillhouse.json").read_text())


def expressions():
    return [t["expr"] for panel in dashboard()["panels"] for t in panel.get("targets", [])]


def test_expressions_are_promql():
    assert len(expressions()) > 10
    for expression in expressions():
        promql_parser.parse(expression.replace("$__rate_interval", "5m"))
    with pytest.raises(ValueError, match="expected type matrix"):
        promql_parser.parse("rate(ray_stillhouse_parts_total)")


def test_metrics_are_named_as_prometheus_wants():
    """Counters end in _total, units are in the name and are base units."""
    text = json.dumps(dashboard())
    used = set(re.findall(r"\bray_[a-z0-9_]+", text))
    assert used == OURS | RAYS
    for expression in expressions():
        for name in re.findall(r"(?:rate|increase)\((ray_stillhouse\w+)", expression):
            assert name.endswith(("_total", "_sum", "_bucket"))


def test_dashboard_is_read_as_it_is_written():
    """Grafana's own model of a dashboard keeps all panels; they have their places to themselves."""
    raw = dashboard()
    read = Dashboard.from_json(raw)
    assert (read.uid, read.title) == ("stillhouse", "Stillhouse")
    assert [p.title for p in read.panels] == [p["title"] for p in raw["panels"]]
    panels = raw["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for one, other in combinations([panel["gridPos"] for panel in panels], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)
    known = {variable["name"] for variable in raw["templating"]["list"]}
    names = re.findall(r"\$\{?(\w+)", json.dumps(panels))
    assert set(names) <= known | {"__rate_interval"}


def test_dockerfile():
    """hadolint finds nothing; what is copied is what .dockerignore lets through."""
    hadolint = shutil.which("hadolint", path=Path(sys.executable).parent) or "hadolint"
    found = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "")
    text = (ROOT / "Dockerfile").read_text()
    copied = [w for line in re.findall(r"^COPY --\S+ (.*) \S+$", text, re.M) for w in line.split()]
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {f"!{name}" for name in copied} == {line for line in ignored if line[0] == "!"}
    assert all((ROOT / name).exists() for name in copied)
    assert f"RAY_VERSION={version('ray')}" in text
