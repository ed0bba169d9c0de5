"""deploy/ and Dockerfile; kubernetes-validate holds manifests against strict schemas, offline."""

import json
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from exported import exported_names
from manifests import check_objects

import stillhouse
from stillhouse.actors.metrics import METRICS
from stillhouse.jobs.schedule import Place, schedule
from stillhouse.jobs.spec_file import load_spec

ROOT = Path(__file__).parents[1]
KUBERNETES = ROOT / "deploy" / "kubernetes"
IMAGE = f"REGISTRY/stillhouse:{stillhouse.__version__}"


def load(name):
    return list(yaml.safe_load_all((KUBERNETES / name).read_text()))


def test_every_manifest_is_one_that_kubernetes_takes():
    kinds = {}
    for path in sorted(KUBERNETES.iterdir()):
        found = load(path.name)
        if path.name == "merge.yaml":  # pieces: see test_schedule.py
            continue
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


def test_the_cluster_that_stays_has_what_is_made_for_a_nightly_one():
    """Written by hand, and so beside what `schedule` makes: sizes, security, annotations."""
    ours = load("raycluster.yaml")[0]["spec"]
    made = load("rayjob.yaml")[1]["spec"]["rayClusterSpec"]
    assert ours["autoscalerOptions"] == made["autoscalerOptions"]
    groups = zip(
        [ours["headGroupSpec"], *ours["workerGroupSpecs"]],
        [made["headGroupSpec"], *made["workerGroupSpecs"]],
        strict=True,
    )
    for one, other in groups:
        pod, wanted = one["template"], other["template"]
        assert pod["metadata"]["annotations"] == wanted["metadata"]["annotations"]
        for key in ("securityContext", "restartPolicy"):
            assert pod["spec"][key] == wanted["spec"][key]
        tolerations = wanted["spec"].get("tolerations", [])
        assert [t for t in tolerations if t not in pod["spec"].get("tolerations", [])] == []
        container, made_container = pod["spec"]["containers"][0], wanted["spec"]["containers"][0]
        for key in ("resources", "securityContext"):
            assert container[key] == made_container[key]
        assert container["volumeMounts"] == made_container["volumeMounts"][:1]


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


def test_dockerfile():
    """What is copied is there, and what .dockerignore lets through."""
    text = (ROOT / "Dockerfile").read_text()
    copied = [w for line in re.findall(r"^COPY --\S+ (.*) \S+$", text, re.M) for w in line.split()]
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {f"!{name}" for name in copied} == {line for line in ignored if line[0] == "!"}
    assert all((ROOT / name).exists() for name in copied)
    assert f"RAY_VERSION={version('ray')}" in text


def dashboard():
    return json.loads((ROOT / "deploy" / "grafana" / "stillhouse.json").read_text())


def test_dashboard_asks_for_metrics_that_are_recorded():
    """And for all of them; a rate is taken of counters alone; Ray's own are a known few."""
    expressions = [t["expr"] for panel in dashboard()["panels"] for t in panel.get("targets", [])]
    assert len(expressions) > 10
    used = {n for text in expressions for n in re.findall(r"\bray_[a-z0-9_]+", text)}
    names = {name for metric in METRICS for name in exported_names(metric)}
    theirs = {"ray_node_gpus_utilization"} | {
        f"ray_cluster_{state}_nodes" for state in ("active", "pending", "failed")
    }
    assert used - names == theirs
    assert all(used & set(exported_names(metric)) for metric in METRICS)
    for name in re.findall(r"(?:rate|increase)\((ray_stillhouse\w+)", " ".join(expressions)):
        assert name.endswith(("_total", "_sum", "_bucket"))
    labels = {label for metric in METRICS.values() for label in metric.labels} | {"le"}
    for text in expressions:
        if "ray_stillhouse" in text:
            used_labels = re.findall(r"by \(([\w, ]+)\)", text) + re.findall(r"\{(\w+)=~", text)
            assert {n for found in used_labels for n in found.split(", ")} <= labels


def test_dashboard_panels_have_their_places_to_themselves():
    raw = dashboard()
    panels = raw["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
    known = {variable["name"] for variable in raw["templating"]["list"]}
    names = set(re.findall(r"\$\{?(\w+)", json.dumps(panels)))
    assert names <= known | {"__rate_interval"}
