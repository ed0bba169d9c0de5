"""What `stillhouse schedule` prints, checked against Kubernetes' schemas and run by a shell."""

import fcntl
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from kubernetes_validate import ValidationError
from manifests import check_objects
from small import small_spec

from stillhouse.errors import SpecError
from stillhouse.jobs.kubernetes import merge
from stillhouse.jobs.schedule import Place, least_gap_s, object_name, schedule
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
LOCAL = {"store": "./store", "pool": {"path": ["s3://a/b", "data/*.parquet"]}}


def remote(**changes):
    return SelectSpec.model_validate(REMOTE | changes)


def objects(kind, place=IMAGE, **changes):
    text = schedule("books.yaml", remote(**changes), [], "0 3 * * *", kind, place)
    found = list(yaml.safe_load_all(text))
    check_objects(found)
    return found


@pytest.mark.parametrize(
    ("line", "gap_s"),
    [
        ("  0  3 * * *", 24 * 3600),
        ("0 3,5 * * 1-5", 2 * 3600),
        ("30 * * * *", 3600),
        ("@weekly", 7 * 24 * 3600),
        ("0 6 * * 1,3", 2 * 24 * 3600),
        ("0 0 1 * *", 28 * 24 * 3600),
        ("0 0 1 * 1", 24 * 3600),  # the first may be a Sunday: either day counts
        ("0 23,1 * * *", 2 * 3600),
        ("0 0 29 2 *", 1461 * 24 * 3600),
        ("0 0 31 2 1", 7 * 24 * 3600),  # the weekday is enough
        ("*/15 0-6,22,23 1 jan-MAR,12 Mon-Fri", 15 * 60),
    ],
)
def test_time_between_two_runs(line, gap_s):
    assert least_gap_s(line) == gap_s


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "has 0 fields, not 5: give minute, hour, day of month, month, weekday"),
        ("0 0 3 * * *", "has 6 fields, not 5"),
        ("@reboot", "has 1 fields, not 5.*@daily"),
        ("60 3 * * *", "bad minute"),
        ("0 25 * * *", "bad hour"),
        ("0 3 * * 7", "weekdays 0 to 6"),
        ("0 3 L * *", "plain days"),
        ("0 3 * * Funday", "bad day-of-week"),
        ("0 3 30 2 *", "bad day-of-month"),
    ],
)
def test_bad_cron_lines(line, message):
    with pytest.raises(SpecError, match=message):
        schedule("books.yaml", remote(), [], line, "crontab", Place())


def test_ray_cron_job():
    spec_map, job = objects("raycronjob", compute={"address": "auto", "scorers": 20})
    name = object_name("books.yaml", remote())
    assert spec_map["metadata"]["name"] == job["metadata"]["name"] == name
    shipped = yaml.safe_load(spec_map["data"]["spec.yaml"])
    assert SelectSpec.model_validate(shipped) == remote(compute={"scorers": 20})
    assert job["spec"]["schedule"] == "0 3 * * *"
    template = job["spec"]["jobTemplate"]
    assert template["entrypoint"] == "bash /etc/stillhouse/run.sh"
    # each retry of KubeRay's would have the whole time again
    assert (template["backoffLimit"], template["activeDeadlineSeconds"]) == (0, 24 * 3600 - 900)
    assert template["ttlSecondsAfterFinished"] < 900
    cluster = template["rayClusterSpec"]
    assert cluster["rayVersion"] == version("ray")
    assert cluster["authOptions"] == {"mode": "token"}
    head = cluster["headGroupSpec"]
    assert head["rayStartParams"] == {"num-cpus": "0"}
    volumes = {volume["name"]: volume for volume in head["template"]["spec"]["volumes"]}
    assert volumes["spec"]["configMap"]["name"] == name
    annotations = head["template"]["metadata"]["annotations"]
    assert annotations["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false"
    [group] = cluster["workerGroupSpecs"]
    assert (group["groupName"], group["minReplicas"]) == ("cpu", 0)


@pytest.mark.parametrize(
    ("compute", "cpu_nodes", "gpu_nodes", "gpus"),
    [
        ({"scorers": 64, "gpus_per_worker": 1}, 4, 64, "1"),
        ({"scorers": 64, "gpus_per_worker": 0.25, "packers": 80}, 10, 16, "1"),
        ({"scorers": 3, "trainers": 4, "gpus_per_worker": 2}, 4, 4, "2"),
    ],
)
def test_worker_groups_hold_what_the_spec_needs(compute, cpu_nodes, gpu_nodes, gpus):
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
    rule = spec["jobTemplate"]["spec"]["podFailurePolicy"]["rules"][0]
    assert rule == {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2, 3]}}
    for address, secret in ((place.address, "night"), ("https://ray.example", "ray-auth-token")):
        _, job = objects("cronjob", replace(place, address=address))
        pod = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
        reference = pod["containers"][0]["env"][0]["valueFrom"]["secretKeyRef"]
        assert reference == {"name": secret, "key": "auth_token"}


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
def test_the_script_retries_what_may_succeed(tmp_path, codes, calls, ends_with):
    """A real shell; the programs that it calls write down that they were called."""
    spec_map, _ = objects("raycronjob")
    (tmp_path / "run.sh").write_text(spec_map["data"]["run.sh"])
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


def test_the_users_additions_are_merged_in():
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
    limits = head["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits == {"cpu": "4", "memory": "32Gi", "ephemeral-storage": "20Gi"}
    for pod in pods:
        mounts = [{m["name"] for m in c["volumeMounts"]} for c in pod["spec"]["containers"]]
        assert all("ray-logs" in names for names in mounts)
    made = {"a": {"b": 1, "c": [1]}, "l": [{"name": "x", "v": 1}], "gone": 1, "s": "old"}
    own = {"a": {"c": [1, 2]}, "l": [{"name": "y"}, {"name": "x", "w": 2}], "gone": None, "s": "n"}
    expected = {"a": {"b": 1, "c": [1, 2]}, "l": [{"name": "x", "v": 1, "w": 2}, {"name": "y"}]}
    assert merge(made, own) == expected | {"s": "n"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("pods: {spec: {}}", "unknown key `pods`; known: pod, head, cpu, gpu, job"),
        ("pod: [1]", "a mapping of mappings"),
        ("pod: {", "is not YAML"),
        (None, "no such file"),
    ],
)
def test_a_file_that_cannot_be_merged(tmp_path, content, message):
    path = tmp_path / "merge.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SpecError, match=message):
        objects("raycronjob", replace(IMAGE, merged=str(path)))


def test_the_checker_of_these_tests_refuses_what_a_cluster_would():
    _, job = objects("raycronjob")
    head = ("spec", "jobTemplate", "rayClusterSpec", "headGroupSpec")
    for path, value in (
        (("spec", "concurrencyPolicy"), "Forbid"),
        (("spec", "jobTemplate", "entryPoint"), "x"),
        ((*head, "rayStartParams"), {"num-cpus": 0}),
        ((*head, "template", "spec", "node"), "x"),
        (("metadata", "labels"), {"a": 1}),
    ):
        changed = yaml.safe_load(yaml.safe_dump(job))
        section = changed
        for step in path[:-1]:
            section = section[step]
        section[path[-1]] = value
        with pytest.raises((AssertionError, ValidationError)):
            check_objects([changed])


ZONE = {"image": "x", "time_zone": "Europe/Bärlin"}
ACCOUNT = {"image": "x", "address": "h:1", "service_account": "A b"}


@pytest.mark.parametrize(
    ("kind", "place", "changes", "message"),
    [
        ("raycronjob", {}, {}, "--kind raycronjob needs --image"),
        ("cronjob", {"image": "x"}, {}, "submits to a running cluster: give --address"),
        ("raycronjob", {"image": "x"}, LOCAL, "a RayCronJob cannot read local paths: `store: ./st"),
        ("cronjob", {"image": "x"}, LOCAL, "a CronJob cannot.*, `pool.path: data/[*].parquet`"),
        ("raycronjob", {"image": "x", "address": "http://h:1"}, {}, "no use for --address"),
        ("crontab", {"image": "x"}, {}, "no use for --image"),
        ("crontab", {"service_account": "x"}, {}, "no use for --service-account"),
        ("crontab", {"merged": "x"}, {}, "no use for --merge"),
        ("crontab", {"time_zone": "Europe/Berlin"}, {}, "no use for --time-zone"),
        ("raycronjob", ZONE, {}, "is unknown: use a name such as Europe/Berlin"),
        ("raycronjob", ZONE | {"time_zone": "../etc"}, {}, "is unknown: use a name"),
        ("crontab", {"address": "foo://h"}, {}, "is no dashboard"),
        ("cronjob", {"image": "x", "address": "ray://h:10001"}, {}, "is no dashboard"),
        ("cronjob", ACCOUNT, {}, "is not a valid name in Kubernetes"),
    ],
)
def test_what_cannot_be_scheduled(kind, place, changes, message):
    with pytest.raises(SpecError, match=message):
        schedule("books.yaml", remote(**changes), [], "0 3 * * *", kind, Place(**place))


def test_a_cluster_for_each_run_needs_time_between_two():
    with pytest.raises(SpecError, match="comes every 15 minutes"):
        schedule("books.yaml", remote(), [], "*/15 * * * *", "raycronjob", IMAGE)


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


def test_from_the_command_line(tmp_path, reports):
    path = tmp_path / "books.yaml"
    path.write_text(yaml.safe_dump(REMOTE))
    options = ["--cron", "0 3 * * *", "--kind", "raycronjob", "--image", "x"]
    code, found = reports("schedule", str(path), *options)
    assert code == 0
    check_objects(yaml.safe_load_all(found["text"]))


def test_a_crontab_line_runs_as_it_is(tmp_path, monkeypatch):
    """A shell runs the line; the spec has a mistake by then, so that no Ray starts."""
    folder = tmp_path / "it's here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    path = folder / "my spec.yaml"
    path.write_text(yaml.safe_dump(small_spec(tmp_path)))
    sets = ["name=100% of it", "selection.tau=4"]
    spec = SelectSpec.model_validate(small_spec(tmp_path, name="100% of it"))
    text = schedule("my spec.yaml", spec, sets, "@daily", "crontab", Place())
    comment, line = text.splitlines()
    name = object_name("my spec.yaml", spec)
    assert comment.startswith(f"# {name}: output and exit codes go to {name}.log")
    when, command = line.split(" ", 1)
    assert when == "@daily"
    assert "%" not in command.replace(r"\%", "")
    path.write_text("job: select\nselect: 1\n")
    bare = ["env", "-i", "HOME=/", "sh", "-c", command.replace(r"\%", "%")]  # as cron starts it
    assert subprocess.run(bare, check=False).returncode == 2
    log = folder / f"{name}.log"
    assert "unknown key `select`" in log.read_text()
    assert log.read_text().endswith("\nexit code 2\n")
    with open(folder / f"{name}.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as a run that is still working holds it
        assert subprocess.run(bare, check=False).returncode == 75
    assert log.read_text().endswith("\nexit code 75\n")
    assert log.read_text().count("unknown key") == 1


def test_a_crontab_line_sets_its_environment_but_no_secret(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AWS_PROFILE", "night shift")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    program = tmp_path / "stillhouse"
    program.write_text('#!/bin/sh\necho "$AWS_PROFILE, $PATH, $AWS_SECRET_ACCESS_KEY."')
    program.chmod(0o755)
    text = schedule("s3://b/a.yaml", remote(), [], "@daily", "crontab", Place())
    command = text.splitlines()[1].removeprefix("@daily ").replace(r"\%", "%")
    subprocess.run(["env", "-i", "sh", "-c", command], check=True)
    log = tmp_path / f"{object_name('s3://b/a.yaml', remote())}.log"
    assert f"night shift, {os.environ['PATH']}, ." in log.read_text()
    assert "hidden" not in text


def test_a_crontab_line_for_a_running_cluster():
    place = Place("http://head:8265")
    text = schedule("s3://b/books.yaml", remote(), ["a=b"], "0 3 * * *", "crontab", place)
    assert text.splitlines()[1].startswith("0 3 * * * cd ")
    assert " submit s3://b/books.yaml --set a=b --address http://head:8265 --follow; " in text
    assert text.endswith(f">> {object_name('s3://b/books.yaml', remote())}.log 2>&1\n")
    with pytest.raises(SpecError, match="cannot hold a line break"):
        schedule("a.yaml", remote(), ["name=a\nb"], "0 3 * * *", "crontab", Place())
