"""What `stillhouse schedule` prints, held against the schemas of Kubernetes and run by a shell."""

import os
import re
import subprocess
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from kubernetes_validate import ValidationError
from manifests import check_objects

from stillhouse.errors import SpecError
from stillhouse.jobs.manifests import merge
from stillhouse.jobs.schedule import Place, object_name, schedule
from stillhouse.spec import SelectSpec

DEPLOY = Path(__file__).parents[2] / "deploy" / "kubernetes"
REMOTE = {
    "job": "select",
    "store": "s3://bucket/store",
    "publish": "books.daily",
    "pool": {"path": "s3://bucket/pool/*.parquet"},
    "target": {"path": ["s3://bucket/books.parquet"]},
    "selection": {"tau": 8},
    "prior": {"model": {"hidden_size": 128}},
}
IMAGE = Place(image="registry.example/stillhouse:1", service_account="stillhouse")


def remote(**changes):
    return SelectSpec.model_validate(REMOTE | changes)


def objects(kind, place=IMAGE, **changes):
    text = schedule("books.yaml", remote(**changes), [], "0 3 * * *", kind, place)
    found = list(yaml.safe_load_all(text))
    check_objects(found)
    return found


def test_ray_cron_job():
    spec_map, job = objects("raycronjob", compute={"address": "auto", "scorers": 20})
    name = object_name("books.yaml", remote())
    assert spec_map["metadata"]["name"] == job["metadata"]["name"] == name
    shipped = yaml.safe_load(spec_map["data"]["spec.yaml"])
    assert SelectSpec.model_validate(shipped) == remote(compute={"scorers": 20})
    assert job["spec"]["schedule"] == "0 3 * * *"
    template = job["spec"]["jobTemplate"]
    assert template["entrypoint"] == "bash /etc/stillhouse/run.sh"
    assert (template["backoffLimit"], template["activeDeadlineSeconds"]) == (0, 85_500)
    cluster = template["rayClusterSpec"]
    assert cluster["rayVersion"] == version("ray")
    assert cluster["authOptions"] == {"mode": "token"}
    head = cluster["headGroupSpec"]
    assert head["rayStartParams"] == {"num-cpus": "0"}
    volumes = {volume["name"]: volume for volume in head["template"]["spec"]["volumes"]}
    assert volumes["spec"]["configMap"]["name"] == name
    annotations = head["template"]["metadata"]["annotations"]
    assert annotations["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false"
    assert [group["groupName"] for group in cluster["workerGroupSpecs"]] == ["cpu"]
    assert {group["minReplicas"] for group in cluster["workerGroupSpecs"]} == {0}


@pytest.mark.parametrize(
    ("compute", "cpu_nodes", "gpu_nodes", "gpus"),
    [
        ({"scorers": 64, "gpus_per_worker": 1}, 4, 64, "1"),
        ({"scorers": 64, "gpus_per_worker": 0.25, "packers": 80}, 10, 16, "1"),
        ({"scorers": 3, "trainers": 4, "gpus_per_worker": 2}, 4, 4, "2"),
    ],
)
def test_worker_groups_hold_what_the_spec_asks_for(compute, cpu_nodes, gpu_nodes, gpus):
    _, job = objects("raycronjob", compute=compute)
    cpu, gpu = job["spec"]["jobTemplate"]["rayClusterSpec"]["workerGroupSpecs"]
    assert (cpu["maxReplicas"], gpu["maxReplicas"]) == (cpu_nodes, gpu_nodes)
    limits = gpu["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == gpus
    tolerated = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    assert gpu["template"]["spec"]["tolerations"] == [tolerated]
    assert "tolerations" not in cpu["template"]["spec"]
    for group in (cpu, gpu):
        amounts = group["template"]["spec"]["containers"][0]["resources"]
        assert "ephemeral-storage" in amounts["limits"]


def test_cron_job_submits_to_a_running_cluster():
    place = Place("http://night-head-svc.ray.svc:8265", "registry.example/stillhouse:1")
    _, job = objects("cronjob", place)
    spec = job["spec"]
    assert (spec["schedule"], spec["timeZone"]) == ("0 3 * * *", "Etc/UTC")
    assert spec["concurrencyPolicy"] == "Forbid"
    pod = spec["jobTemplate"]["spec"]["template"]["spec"]
    assert "serviceAccountName" not in pod
    container = pod["containers"][0]
    assert container["command"] == ["stillhouse", "submit", "/etc/stillhouse/spec.yaml"]
    assert container["args"] == ["--address", place.address, "--follow"]
    assert container["env"][0]["valueFrom"]["secretKeyRef"] == {
        "name": "night",
        "key": "auth_token",
    }
    rule = spec["jobTemplate"]["spec"]["podFailurePolicy"]["rules"][0]
    assert rule == {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2, 3]}}


@pytest.mark.parametrize(
    ("cron", "deadline"),
    [
        ("0 3 * * *", 24 * 3600 - 900),
        ("0 3,5 * * 1-5", 2 * 3600 - 900),
        ("30 * * * *", 3600 - 900),
        ("@weekly", 7 * 24 * 3600 - 900),
        ("0 6 * * 1,3", 2 * 24 * 3600 - 900),
        ("0 0 1 * *", 28 * 24 * 3600 - 900),
        ("0 0 1 * 1", 24 * 3600 - 900),  # the first may be a Sunday: either day counts
        ("0 23,1 * * *", 2 * 3600 - 900),
        ("0 0 29 2 *", 1461 * 24 * 3600 - 900),
    ],
)
def test_a_run_has_ended_before_the_next_cluster_starts(cron, deadline):
    text = schedule("books.yaml", remote(), [], cron, "raycronjob", IMAGE)
    template = list(yaml.safe_load_all(text))[1]["spec"]["jobTemplate"]
    assert template["activeDeadlineSeconds"] == deadline
    assert template["backoffLimit"] == 0  # each repetition would have the whole time again
    assert template["ttlSecondsAfterFinished"] < 900


def test_a_cluster_for_each_run_needs_time_between_two():
    with pytest.raises(SpecError, match="comes every 15 minutes"):
        schedule("books.yaml", remote(), [], "*/15 * * * *", "raycronjob", IMAGE)


def test_time_zones():
    zone = replace(IMAGE, time_zone="Europe/Berlin")
    _, job = objects("raycronjob", zone)
    assert job["spec"]["timeZone"] == "Europe/Berlin"
    # an hour less than in UTC: in spring a day has 23
    assert job["spec"]["jobTemplate"]["activeDeadlineSeconds"] == 23 * 3600 - 900
    _, job = objects("cronjob", replace(zone, address="http://h-head-svc:8265"))
    assert job["spec"]["timeZone"] == "Europe/Berlin"
    _, job = objects("raycronjob")
    assert "timeZone" not in job["spec"]  # KubeRay 1.6 refuses it


@pytest.mark.parametrize(
    ("codes", "calls", "ends_with"),
    [([0], 1, 0), ([2], 1, 2), ([4, 3], 2, 3), ([1, 4, 137, 0], 4, 0), ([4] * 9, 4, 4)],
)
def test_the_script_repeats_what_may_come_out_otherwise(tmp_path, codes, calls, ends_with):
    """A real shell; the programs that it calls write down that they were called."""
    spec_map, _ = objects("raycronjob")
    script = tmp_path / "run.sh"
    script.write_text(spec_map["data"]["run.sh"])
    for name, then in (("stillhouse", 'exit "$(sed -n "${calls}p" codes)"'), ("sleep", "")):
        program = tmp_path / name
        program.write_text(
            f'#!/bin/sh\necho "$@" >> {name}.log\ncalls=$(wc -l < {name}.log)\n{then}'
        )
        program.chmod(0o755)
    (tmp_path / "codes").write_text("\n".join(map(str, codes)) + "\n")
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(["bash", "run.sh"], cwd=tmp_path, env={"PATH": path}, check=False)
    assert done.returncode == ends_with
    called = (tmp_path / "stillhouse.log").read_text().splitlines()
    assert called == ["run /etc/stillhouse/spec.yaml"] * calls
    slept = tmp_path / "sleep.log"
    waits = slept.read_text().split() if slept.exists() else []
    assert waits == ["30", "60", "90"][: calls - 1]


def test_what_a_cluster_of_ones_own_needs_is_merged_in():
    """With the file that the documentation points to."""
    own = replace(IMAGE, merged=str(DEPLOY / "merge.yaml"))
    _, job = objects("raycronjob", own, compute={"scorers": 4, "gpus_per_worker": 1})
    template = job["spec"]["jobTemplate"]
    assert template["activeDeadlineSeconds"] == 28_800
    cluster = template["rayClusterSpec"]
    head, (cpu, gpu) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert (cpu["maxReplicas"], gpu["maxReplicas"]) == (16, 8)
    pods = [group["template"] for group in (head, cpu, gpu)]
    for pod in [*pods, template["submitterPodTemplate"]]:
        assert pod["metadata"]["labels"]["team"] == "data"
        assert pod["metadata"]["labels"]["app.kubernetes.io/name"] == "stillhouse"
        assert pod["spec"]["imagePullSecrets"] == [{"name": "registry"}]
        main = pod["spec"]["containers"][0]
        assert main["image"] == own.image
        assert main["envFrom"] == [{"secretRef": {"name": "object-store"}}]
    spot = {"key": "spot", "operator": "Exists", "effect": "NoSchedule"}
    assert cpu["template"]["spec"]["tolerations"] == [spot]
    assert [t["key"] for t in gpu["template"]["spec"]["tolerations"]] == ["nvidia.com/gpu", "spot"]
    assert head["template"]["spec"]["nodeSelector"] == {"pool": "on-demand"}
    assert [c["name"] for c in head["template"]["spec"]["containers"]] == ["ray-head", "logs"]
    assert head["template"]["spec"]["containers"][0]["resources"]["limits"] == {
        "cpu": "4",
        "memory": "32Gi",
        "ephemeral-storage": "20Gi",
    }
    for pod in pods:
        mounts = [{m["name"] for m in c["volumeMounts"]} for c in pod["spec"]["containers"]]
        assert all("ray-logs" in names for names in mounts)


def test_merging_by_hand():
    made = {"a": {"b": 1, "c": [1]}, "l": [{"name": "x", "v": 1}], "gone": 1, "s": "old"}
    own = {
        "a": {"c": [1, 2]},
        "l": [{"name": "y"}, {"name": "x", "w": 2}],
        "gone": None,
        "s": "new",
    }
    assert merge(made, own) == {
        "a": {"b": 1, "c": [1, 2]},
        "l": [{"name": "x", "v": 1, "w": 2}, {"name": "y"}],
        "s": "new",
    }


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("pods: {spec: {}}", "unknown key `pods`; known: pod, head, cpu, gpu, job"),
        ("pod: [1]", "a mapping of mappings"),
        ("pod: {", "is not YAML"),
        (None, "no such file"),
    ],
)
def test_a_file_that_cannot_be_merged(tmp_path, content, said):
    path = tmp_path / "merge.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SpecError, match=said):
        objects("raycronjob", replace(IMAGE, merged=str(path)))


def test_the_token_secret_of_another_address():
    _, job = objects("cronjob", Place("https://ray.example", "i"))
    pod = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["env"][0]["valueFrom"]["secretKeyRef"]["name"] == "ray-auth-token"


def test_the_checker_refuses_what_a_cluster_would():
    """A test that holds manifests against a checker is worth what the checker finds."""
    _, job = objects("raycronjob")
    for path, value in (
        (("spec", "concurrencyPolicy"), "Forbid"),
        (("spec", "jobTemplate", "entryPoint"), "x"),
        (
            ("spec", "jobTemplate", "rayClusterSpec", "headGroupSpec", "rayStartParams"),
            {"num-cpus": 0},
        ),
        (
            ("spec", "jobTemplate", "rayClusterSpec", "headGroupSpec", "template", "spec", "node"),
            "x",
        ),
        (("metadata", "labels"), {"a": 1}),
    ):
        changed = yaml.safe_load(yaml.safe_dump(job))
        place = changed
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value
        with pytest.raises((AssertionError, ValidationError)):
            check_objects([changed])


@pytest.mark.parametrize(
    ("kind", "place", "changes", "sentence"),
    [
        ("raycronjob", Place(), {}, "--kind raycronjob needs --image"),
        ("cronjob", IMAGE, {}, "--kind cronjob submits to a running cluster: give --address"),
        (
            "raycronjob",
            IMAGE,
            {"store": "./store", "pool": {"path": ["s3://a/b", "data/*.parquet"]}},
            "a RayCronJob cannot read local paths: `store: ./store`, `pool.path: data/[*].parquet`",
        ),
        ("cronjob", IMAGE, {"prior": {"path": "./p"}}, "a CronJob cannot.*`prior.path: ./p`"),
    ],
)
def test_what_cannot_be_scheduled(kind, place, changes, sentence):
    with pytest.raises(SpecError, match=sentence):
        schedule("books.yaml", remote(**changes), [], "0 3 * * *", kind, place)


def test_hub_names_and_mounted_disks_are_not_local():
    objects(
        "raycronjob",
        store="file:///mnt/shared/store",
        tokenizer="owner/name",
        prior={"path": "owner/model"},
        conditional={"path": "s3://bucket/model"},
        selection={"threshold_from": "0" * 64},
    )


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "stillhouse-books-daily"),
        ({"publish": None, "name": "Python's own prose"}, "stillhouse-python-s-own-prose"),
        ({"publish": None}, "stillhouse-my-books"),
        ({"publish": None, "name": "本"}, "stillhouse-job"),
        ({"publish": "a" * 63}, "stillhouse-" + "a" * 18),
    ],
)
def test_names_of_objects(changes, name):
    found = object_name("dir/My books.yaml", remote(**changes))
    assert re.fullmatch(f"{name}-[0-9a-f]{{6}}", found)
    assert found == object_name("dir/My books.yaml", remote(**changes))
    assert len(found) + len("-29000000") <= 47  # a RayJob's name: with the minute it is started in


def test_no_two_schedules_have_one_name():
    alike = [{"publish": "a" * 62 + end} for end in "bc"] + [{"publish": p} for p in ("a.b", "a-b")]
    names = [object_name("a.yaml", remote(**changes)) for changes in alike]
    names += [object_name(path, remote(publish=None)) for path in ("a/s.yaml", "b/s.yaml")]
    names += [object_name("a.yaml", remote(publish="b", store="s3://other/store"))]
    names += [object_name("a.yaml", remote(publish="b"))]
    assert len({*names}) == len(names)


@pytest.mark.parametrize(
    ("kind", "place", "said"),
    [
        ("raycronjob", {"image": "x", "address": "http://h:1"}, "no use for --address"),
        ("crontab", {"image": "x"}, "no use for --image"),
        ("crontab", {"service_account": "x"}, "no use for --service-account"),
        ("crontab", {"merged": "x"}, "no use for --merge"),
        ("crontab", {"time_zone": "Europe/Berlin"}, "no use for --time-zone"),
        ("raycronjob", {"image": "x", "time_zone": "Europe/Bärlin"}, "is no time zone"),
        ("raycronjob", {"image": "x", "time_zone": "../etc"}, "is no time zone"),
        ("crontab", {"address": "foo://h"}, "is no dashboard"),
        ("cronjob", {"image": "x", "address": "ray://h:10001"}, "is no dashboard"),
        ("cronjob", {"image": "x", "address": "h:1", "service_account": "A b"}, "is no name in"),
    ],
)
def test_places_that_a_kind_cannot_have(kind, place, said):
    with pytest.raises(SpecError, match=said):
        schedule("books.yaml", remote(), [], "0 3 * * *", kind, Place(**place))


def test_from_the_command_line(tmp_path, reports):
    path = tmp_path / "books.yaml"
    path.write_text(yaml.safe_dump(REMOTE))
    code, found = reports(
        "schedule", str(path), "--cron", "0 3 * * *", "--kind", "raycronjob", "--image", "x"
    )
    assert code == 0
    check_objects(yaml.safe_load_all(found["text"]))
    code, found = reports("schedule", str(path), "--cron", "0 25 * * *", "--kind", "crontab")
    assert code == 2
    assert "hour '25' is out of range" in found["error"]
