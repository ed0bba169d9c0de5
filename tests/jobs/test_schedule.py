"""What `stillhouse schedule` prints, held against the schemas of Kubernetes and run by a shell."""

import re
import subprocess
from importlib.metadata import version

import pytest
import yaml
from kubernetes_validate import ValidationError
from manifests import check_objects
from small import small_spec

from stillhouse.errors import SpecError
from stillhouse.jobs.schedule import Place, object_name, schedule
from stillhouse.spec import SelectSpec

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
    assert template["entrypoint"] == "stillhouse run /etc/stillhouse/spec.yaml"
    cluster = template["rayClusterSpec"]
    assert cluster["rayVersion"] == version("ray")
    assert cluster["authOptions"] == {"mode": "token"}
    head = cluster["headGroupSpec"]
    assert head["rayStartParams"] == {"num-cpus": "0"}
    assert head["template"]["spec"]["volumes"][0]["configMap"]["name"] == name
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


def test_the_token_secret_of_another_address():
    _, job = objects("cronjob", Place("https://ray.example", "i"))
    pod = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["env"][0]["valueFrom"]["secretKeyRef"]["name"] == "ray-auth-token"


def test_the_checker_refuses_what_a_cluster_would():
    """A test that holds manifests against a checker is worth what the checker finds."""
    _, job = objects("raycronjob")
    for path, value in (
        (("spec", "timeZone"), "Etc/UTC"),
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


def test_crontab_line_runs_as_it_stands(tmp_path, monkeypatch):
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
    assert comment == f"# {name}: exit codes and errors go to {name}.log"
    when, command = line.split(" ", 1)
    assert when == "@daily"
    assert "%" not in command.replace(r"\%", "")
    path.write_text("job: select\nselect: 1\n")
    done = subprocess.run(["sh", "-c", command.replace(r"\%", "%")], check=False)
    assert done.returncode == 2
    assert "unknown key `select`" in (folder / f"{name}.log").read_text()


def test_crontab_line_for_a_running_cluster():
    place = Place("http://head:8265")
    text = schedule("s3://b/books.yaml", remote(), ["a=b"], "0 3 * * *", "crontab", place)
    assert text.splitlines()[1].startswith("0 3 * * * cd ")
    end = "submit s3://b/books.yaml --set a=b --address http://head:8265 --follow"
    log = object_name("s3://b/books.yaml", remote())
    assert f"{end} >> {log}.log 2>&1" in text


def test_a_line_break_is_refused():
    with pytest.raises(SpecError, match="cannot hold a line break"):
        schedule("a.yaml", remote(), ["name=a\nb"], "0 3 * * *", "crontab", Place())


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "stillhouse-books-daily"),
        ({"publish": None, "name": "Python's own prose"}, "stillhouse-python-s-own-prose"),
        ({"publish": None}, "stillhouse-my-books"),
        ({"publish": None, "name": "本"}, "stillhouse-job"),
        ({"publish": "a" * 63}, "stillhouse-" + "a" * 23),
    ],
)
def test_names_of_objects(changes, name):
    found = object_name("dir/My books.yaml", remote(**changes))
    assert re.fullmatch(f"{name}-[0-9a-f]{{6}}", found)
    assert found == object_name("dir/My books.yaml", remote(**changes))


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
