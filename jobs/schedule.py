"""`stillhouse schedule`: manifests for Kubernetes, or a crontab line, that run a spec every time.

A scheduled run with unchanged inputs finds its finished result and ends; overlapping runs adopt
each other's parts. So nothing here has to lock anything.
"""

import math
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import yaml

from stillhouse.errors import ClusterError, SpecError
from stillhouse.fingerprint import fingerprint
from stillhouse.jobs.cron import check_cron
from stillhouse.jobs.paths import refuse_local_paths
from stillhouse.spec import JobSpec

Kind = Literal["raycronjob", "cronjob", "crontab"]
_FOLDER = "/etc/stillhouse"
_PORTS = {"gcs": 6379, "dashboard": 8265, "client": 10001, "metrics": 8080}
_HEAD = {"cpu": "4", "memory": "16Gi"}
_CPU_NODE = {"cpu": "8", "memory": "32Gi"}
_GPU_NODE = {"cpu": "8", "memory": "64Gi"}
_CPUS = 8
_PACKERS = 32
_RESTARTS = 3
_KEPT_S = 86_400
_LABEL = r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a scheduled job runs. `address`: the dashboard's URL of a running cluster."""

    address: str | None = None
    image: str | None = None
    service_account: str | None = None


def schedule(
    path: str, spec: JobSpec, sets: Sequence[str], cron: str, kind: Kind, place: Place
) -> str:
    """The text to apply: YAML documents, or lines for `crontab`.

    Args:
        path: of the spec, as the user gave it; what a crontab line runs.
        spec: what is in it after `sets`; Kubernetes gets a copy of this in a ConfigMap.
        sets: the `--set` options.
        cron: the cron line; Kubernetes reads it in UTC where it can be told to.
        kind: RayCronJob (a cluster for each run), CronJob (submits to a running cluster), crontab.
        place: where.

    Raises:
        SpecError: a bad cron line, local paths for Kubernetes, no image, no address.
    """
    when = check_cron(cron)
    _check_place(kind, place)
    if kind == "crontab":
        return _crontab(path, spec, sets, when, place)
    refuse_local_paths(spec, f"a {'RayCronJob' if kind == 'raycronjob' else 'CronJob'}")
    if place.image is None:
        raise SpecError(f"--kind {kind} needs --image: build one from the Dockerfile")
    if kind == "cronjob":
        if place.address is None:
            raise SpecError(
                "--kind cronjob submits to a running cluster: give --address, "
                "such as http://NAME-head-svc:8265"
            )
        documents = [_config_map(path, spec), _cron_job(path, spec, when, place)]
    else:
        documents = [_config_map(path, spec), _ray_cron_job(path, spec, when, place)]
    return "---\n".join(yaml.dump(d, Dumper=_Dumper, sort_keys=False) for d in documents)


def _check_place(kind: Kind, place: Place) -> None:
    """Refuse what the kind has no use for, and an address that `submit` would refuse every time."""
    unused = {
        "raycronjob": {"--address": place.address},
        "cronjob": {},
        "crontab": {"--image": place.image, "--service-account": place.service_account},
    }[kind]
    for option, value in unused.items():
        if value is not None:
            raise SpecError(f"--kind {kind} has no use for {option}")
    if place.service_account is not None and not re.fullmatch(_LABEL, place.service_account):
        raise SpecError(f"--service-account {place.service_account!r} is no name in Kubernetes")
    if place.address is not None:
        from stillhouse.jobs.ray_jobs import dashboard_url  # brings Ray

        try:
            dashboard_url(place.address)
        except ClusterError as error:
            raise SpecError(str(error)) from None


def object_name(path: str, spec: JobSpec) -> str:
    """What the objects are called: after `publish`, `name` or the file, as Kubernetes allows.

    Six more digits keep apart what would be called alike, and are the same every time.
    """
    given = spec.publish or spec.name
    plain = re.sub(r"[^a-z0-9]+", "-", (given or Path(path).stem).lower())
    digits = fingerprint([spec.store, given or path])[:6]
    return f"stillhouse-{plain.strip('-')[:23].strip('-') or 'job'}-{digits}"


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def _crontab(path: str, spec: JobSpec, sets: Sequence[str], when: str, place: Place) -> str:
    """A comment and the line; the job runs in today's working directory."""
    verb = ["run", path] if place.address is None else ["submit", path]
    options = [word for override in sets for word in ("--set", override)]
    if place.address is not None:
        options += ["--address", place.address, "--follow"]
    command = [str(Path(sys.executable).with_name("stillhouse")), *verb, *options]
    log = f"{object_name(path, spec)}.log"
    line = f"cd {shlex.quote(str(Path.cwd()))} && {shlex.join(command)} >> {log} 2>&1"
    if "\n" in line:
        raise SpecError("a crontab line cannot hold a line break: put that setting into the spec")
    escaped = line.replace("%", r"\%")  # cron would end the command at a bare %
    return f"# {object_name(path, spec)}: exit codes and errors go to {log}\n{when} {escaped}\n"


def _config_map(path: str, spec: JobSpec) -> dict[str, Any]:
    """The spec as written; which cluster it runs on is not its business there."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(path, spec),
        "data": {"spec.yaml": spec.to_send()},
    }


def _metadata(path: str, spec: JobSpec) -> dict[str, Any]:
    labels = {"app.kubernetes.io/name": "stillhouse"}
    return {"name": object_name(path, spec), "labels": labels}


def _cron_job(path: str, spec: JobSpec, when: str, place: Place) -> dict[str, Any]:
    """A pod that submits and follows; failures that a repetition cannot mend are not repeated."""
    assert place.address is not None
    container = {
        "name": "submit",
        "image": place.image,
        "command": ["stillhouse", "submit", f"{_FOLDER}/spec.yaml"],
        "args": ["--address", place.address, "--follow"],
        "env": [
            {
                "name": "RAY_AUTH_TOKEN",
                "valueFrom": {
                    "secretKeyRef": {"name": _token_secret(place.address), "key": "auth_token"}
                },
            }
        ],
        "resources": _resources({"cpu": "500m", "memory": "1Gi"}),
        "volumeMounts": [_mount()],
    }
    no_use = {"operator": "In", "values": [2, 3]}  # bad spec, bad data
    job = {
        "backoffLimit": _RESTARTS,
        "ttlSecondsAfterFinished": _KEPT_S,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": no_use}]},
        "template": {
            "spec": {
                "restartPolicy": "Never",
                **_account(place),
                "containers": [container],
                "volumes": [_volume(path, spec)],
            }
        },
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "CronJob",
        "metadata": _metadata(path, spec),
        "spec": {
            "schedule": when,
            "timeZone": "Etc/UTC",
            "concurrencyPolicy": "Forbid",
            "startingDeadlineSeconds": 3600,
            "jobTemplate": {"spec": job},
        },
    }


def _token_secret(address: str) -> str:
    """KubeRay keeps a token in a secret of the cluster's name, which its service tells."""
    host = urlsplit(address).hostname or ""
    cluster, found, _ = host.split(".")[0].rpartition("-head-svc")
    return cluster if found else "ray-auth-token"


def _ray_cron_job(path: str, spec: JobSpec, when: str, place: Place) -> dict[str, Any]:
    """A RayJob for each run: a head, workers from zero up as they are asked for, then nothing."""
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCronJob",
        "metadata": _metadata(path, spec),
        "spec": {
            "schedule": when,
            "jobTemplate": {
                "entrypoint": f"stillhouse run {_FOLDER}/spec.yaml",
                "backoffLimit": _RESTARTS,
                "shutdownAfterJobFinishes": True,
                "ttlSecondsAfterFinished": 600,
                "rayClusterSpec": {
                    "rayVersion": version("ray"),
                    "authOptions": {"mode": "token"},
                    "enableInTreeAutoscaling": True,
                    "autoscalerOptions": {"version": "v2", "idleTimeoutSeconds": 60},
                    "headGroupSpec": {
                        "rayStartParams": {"num-cpus": "0"},
                        "template": _pod("ray-head", _HEAD, place, _volume(path, spec)),
                    },
                    "workerGroupSpecs": _groups(spec, place),
                },
            },
        },
    }


def _groups(spec: JobSpec, place: Place) -> list[dict[str, Any]]:
    """CPU workers for text, and GPU workers where models run on GPUs; all from zero."""
    compute = spec.compute
    width = max(compute.scorers, compute.trainers)
    cpus = float(compute.packers or _PACKERS)
    groups: list[dict[str, Any]] = []
    each = max(compute.gpus_of(compute.scorer), compute.gpus_of(compute.trainer))
    if each:
        gpus = max(1, math.ceil(each))
        most = math.ceil(width * each / gpus)
        node = _GPU_NODE | {"nvidia.com/gpu": str(gpus)}
        groups.append(_group("gpu", most, node, place))
    else:
        cpus = max(cpus, width * compute.cpus_per_worker)
    return [_group("cpu", math.ceil(cpus / _CPUS), _CPU_NODE, place), *groups]


def _group(name: str, most: int, node: dict[str, str], place: Place) -> dict[str, Any]:
    return {
        "groupName": name,
        "replicas": 0,
        "minReplicas": 0,
        "maxReplicas": most,
        "rayStartParams": {},
        "template": _pod("ray-worker", node, place),
    }


def _pod(
    name: str, node: dict[str, str], place: Place, volume: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A pod of Ray; the head has the spec and its ports. A stopped one never comes back."""
    container: dict[str, Any] = {
        "name": name,
        "image": place.image,
        "resources": _resources(node),
    }
    pod: dict[str, Any] = {"restartPolicy": "Never", **_account(place), "containers": [container]}
    if volume is not None:
        container["ports"] = [{"name": n, "containerPort": p} for n, p in _PORTS.items()]
        container["volumeMounts"] = [_mount()]
        pod["volumes"] = [volume]
    return {"spec": pod}


def _resources(amounts: dict[str, str]) -> dict[str, Any]:
    return {"requests": dict(amounts), "limits": dict(amounts)}


def _account(place: Place) -> dict[str, str]:
    """Whose access to the store the pods have."""
    return {"serviceAccountName": place.service_account} if place.service_account else {}


def _mount() -> dict[str, Any]:
    return {"name": "spec", "mountPath": _FOLDER, "readOnly": True}


def _volume(path: str, spec: JobSpec) -> dict[str, Any]:
    return {"name": "spec", "configMap": {"name": object_name(path, spec)}}
