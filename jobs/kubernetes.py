"""What `stillhouse schedule` makes for Kubernetes: a ConfigMap with a CronJob or a RayCronJob.

Every pod meets the restricted Pod Security Standard. What a user's own cluster needs besides
(tolerations, selectors, secrets, other sizes) is merged in from a file: see `merge`.
"""

import math
from copy import deepcopy
from importlib.metadata import version
from typing import Any
from urllib.parse import urlsplit

from stillhouse.errors import SpecError
from stillhouse.spec import JobSpec

PLACES = ("pod", "head", "cpu", "gpu", "job")
"""Keys of a file to merge: every pod template, the groups of a Ray cluster, the job's own spec."""
_FOLDER = "/etc/stillhouse"
_RETRIES = 3
_SCRIPT = f"""\
# Tries again after a failure, except after a bad spec (2) or bad data (3).
attempt=0
while :; do
  stillhouse run {_FOLDER}/spec.yaml
  code=$?
  case $code in 0|2|3) exit $code;; esac
  attempt=$((attempt + 1))
  [ $attempt -gt {_RETRIES} ] && exit $code
  sleep $((attempt * 30))
done
"""
_PORTS = {"gcs": 6379, "dashboard": 8265, "client": 10001, "metrics": 8080}
_SUBMIT = {"cpu": "500m", "memory": "1Gi", "ephemeral-storage": "1Gi"}
_HEAD = {"cpu": "4", "memory": "16Gi", "ephemeral-storage": "20Gi"}
_CPU_NODE = {"cpu": "8", "memory": "32Gi", "ephemeral-storage": "50Gi"}
_GPU_NODE = {"cpu": "8", "memory": "64Gi", "ephemeral-storage": "50Gi"}
_NODE_CPUS = 8
_TOKENIZER_CPUS = 32
_JOB_TTL_S = 86_400
_CLUSTER_TTL_S = 600
_MIN_GAP_S = 1_800
_POD_SECURITY = {
    "runAsNonRoot": True,
    "runAsUser": 1000,  # `ray` of Ray's own images, which Dockerfile is built from
    "runAsGroup": 100,
    "fsGroup": 100,
    "seccompProfile": {"type": "RuntimeDefault"},
}
_SECURITY = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
_SCRAPED = {"prometheus.io/scrape": "true", "prometheus.io/port": "8080"}
_NOT_EVICTED = {
    "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
    "karpenter.sh/do-not-disrupt": "true",
}
"""For pods whose eviction costs the whole attempt: the head, and the one that submits."""
_GPU_TAINT = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}


class Manifests:
    """The objects of one schedule, all called `name`; `merged` are the user's additions."""

    def __init__(
        self, name: str, spec: JobSpec, image: str, account: str | None, merged: dict[str, Any]
    ) -> None:
        self._name, self._spec, self._image, self._account = name, spec, image, account
        self._merged = merged

    def cron_job(self, when: str, zone: str | None, gap_s: int, address: str) -> list[Any]:
        """A pod that submits to the cluster at `address` and follows the job."""
        token = {"name": _token_secret(address), "key": "auth_token"}
        container = self._container("submit", _SUBMIT) | {
            "command": ["stillhouse", "submit", f"{_FOLDER}/spec.yaml"],
            "args": ["--address", address, "--follow"],
            "env": [{"name": "RAY_AUTH_TOKEN", "valueFrom": {"secretKeyRef": token}}],
        }
        not_retried = {"operator": "In", "values": [2, 3]}  # bad spec, bad data
        job = {
            "backoffLimit": _RETRIES,
            "activeDeadlineSeconds": max(_deadline(gap_s), _MIN_GAP_S),
            "ttlSecondsAfterFinished": _JOB_TTL_S,
            "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": not_retried}]},
            "template": self._pod("submit", container, _NOT_EVICTED, spec_folder=True),
        }
        schedule = {
            "schedule": when,
            "timeZone": zone or "Etc/UTC",
            "concurrencyPolicy": "Forbid",
            "startingDeadlineSeconds": 3600,
            "jobTemplate": {"metadata": {"labels": self._labels()}, "spec": self._add("job", job)},
        }
        return [self._config_map({}), self._object("batch/v1", "CronJob", spec=schedule)]

    def ray_cron_job(self, when: str, zone: str | None, gap_s: int) -> list[Any]:
        """A RayJob for each run: a head, workers from zero up as they are needed, then nothing.

        KubeRay would start the next cluster while one is still running: the deadline of each lies
        before the next is due. KubeRay retries nothing (it cannot tell a bad spec from a lost
        node, and each retry would have the whole deadline again); the job's own script does.
        """
        if gap_s < _MIN_GAP_S:
            raise SpecError(
                f"--cron {when!r} comes every {gap_s // 60} minutes: a cluster for each run needs "
                f"{_MIN_GAP_S // 60}; submit to a running one instead (--kind cronjob)"
            )
        submitter = self._container("ray-job-submitter", _SUBMIT)
        job = {
            "entrypoint": f"bash {_FOLDER}/run.sh",
            "backoffLimit": 0,
            "activeDeadlineSeconds": _deadline(gap_s),
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": _CLUSTER_TTL_S,
            "submitterPodTemplate": self._pod("submit", submitter, _NOT_EVICTED),
            "rayClusterSpec": self._cluster(),
        }
        schedule = {"schedule": when} | ({"timeZone": zone} if zone is not None else {})
        schedule |= {"jobTemplate": self._add("job", job)}
        return [
            self._config_map({"run.sh": _SCRIPT}),
            self._object("ray.io/v1", "RayCronJob", spec=schedule),
        ]

    def _object(self, version: str, kind: str, **content: Any) -> dict[str, Any]:
        metadata = {"name": self._name, "labels": self._labels()}
        return {"apiVersion": version, "kind": kind, "metadata": metadata} | content

    def _config_map(self, scripts: dict[str, str]) -> dict[str, Any]:
        return self._object("v1", "ConfigMap", data={"spec.yaml": self._spec.to_send()} | scripts)

    def _cluster(self) -> dict[str, Any]:
        head = self._container("ray-head", _HEAD)
        head["ports"] = [{"name": name, "containerPort": port} for name, port in _PORTS.items()]
        group = {
            "rayStartParams": {"num-cpus": "0"},
            "template": self._pod("head", head, _SCRAPED | _NOT_EVICTED, spec_folder=True),
        }
        return {
            "rayVersion": version("ray"),
            "authOptions": {"mode": "token"},
            "enableInTreeAutoscaling": True,
            "autoscalerOptions": {
                "version": "v2",
                "idleTimeoutSeconds": 60,
                "securityContext": dict(_SECURITY),
            },
            "headGroupSpec": self._add("head", group),
            "workerGroupSpecs": self._worker_groups(),
        }

    def _worker_groups(self) -> list[dict[str, Any]]:
        """CPU workers for text, and GPU workers where models run on GPUs; all from zero."""
        compute = self._spec.compute
        width = max(compute.scorers, compute.trainers)
        cpus = float(compute.packers or _TOKENIZER_CPUS)
        groups: list[dict[str, Any]] = []
        each = max(compute.gpus_of(compute.scorer), compute.gpus_of(compute.trainer))
        if each:
            gpus = max(1, math.ceil(each))
            node = _GPU_NODE | {"nvidia.com/gpu": str(gpus)}
            groups.append(self._worker_group("gpu", math.ceil(width * each / gpus), node))
        else:
            cpus = max(cpus, width * compute.cpus_per_worker)
        return [self._worker_group("cpu", math.ceil(cpus / _NODE_CPUS), _CPU_NODE), *groups]

    def _worker_group(self, name: str, most: int, node: dict[str, str]) -> dict[str, Any]:
        pod = self._pod(name, self._container("ray-worker", node), _SCRAPED)
        if name == "gpu":
            pod["spec"]["tolerations"] = [_GPU_TAINT, *pod["spec"].get("tolerations", [])]
        group = {
            "groupName": name,
            "replicas": 0,
            "minReplicas": 0,
            "maxReplicas": most,
            "rayStartParams": {},
            "template": pod,
        }
        return self._add(name, group)

    def _container(self, name: str, amounts: dict[str, str]) -> dict[str, Any]:
        return {
            "name": name,
            "image": self._image,
            "securityContext": deepcopy(_SECURITY),
            "resources": {"requests": dict(amounts), "limits": dict(amounts)},
        }

    def _pod(
        self,
        component: str,
        container: dict[str, Any],
        annotations: dict[str, str],
        *,
        spec_folder: bool = False,
    ) -> dict[str, Any]:
        """A pod template. A stopped pod of Ray's is never restarted.

        `/tmp/ray` is a volume, with KubeRay's name for it, so that a container beside Ray's can
        read and ship its logs.
        """
        volumes: list[dict[str, Any]] = []
        mounts: list[dict[str, Any]] = []
        if component != "submit":
            volumes.append({"name": "ray-logs", "emptyDir": {}})
            mounts.append({"name": "ray-logs", "mountPath": "/tmp/ray"})
        if spec_folder:
            volumes.append({"name": "spec", "configMap": {"name": self._name}})
            mounts.append({"name": "spec", "mountPath": _FOLDER, "readOnly": True})
        container = container | ({"volumeMounts": mounts} if mounts else {})
        pod: dict[str, Any] = {"restartPolicy": "Never"}
        pod |= {"serviceAccountName": self._account} if self._account else {}
        pod |= {"securityContext": deepcopy(_POD_SECURITY), "containers": [container]}
        pod |= {"volumes": volumes} if volumes else {}
        metadata = {"labels": self._labels(component), "annotations": dict(annotations)}
        return self._add("pod", {"metadata": metadata, "spec": pod})

    def _labels(self, component: str | None = None) -> dict[str, str]:
        found = {"app.kubernetes.io/name": "stillhouse", "app.kubernetes.io/instance": self._name}
        return found | ({"app.kubernetes.io/component": component} if component else {})

    def _add(self, place: str, made: dict[str, Any]) -> dict[str, Any]:
        """`made` with the user's additions for this place."""
        return merge(made, self._merged.get(place) or {})


def _deadline(gap_s: int) -> int:
    """Seconds that a run may take where the next is due after `gap_s`, with time to remove it."""
    return gap_s - min(900, gap_s // 2)


def _token_secret(address: str) -> str:
    """The secret that KubeRay keeps a cluster's token in, named after the cluster."""
    host = urlsplit(address).hostname or ""
    cluster, found, _ = host.split(".")[0].rpartition("-head-svc")
    return cluster if found else "ray-auth-token"


def merge(made: Any, own: Any) -> Any:
    """`own` over `made`, as `kubectl patch` would do it.

    Mappings merge key by key, `null` removes a key. Items of a list that have the same `name`
    merge, an item without one merges into the first of `containers`, others are added.
    """
    if isinstance(made, list) and isinstance(own, list):
        return _merge_lists(made, own, None)
    if not (isinstance(made, dict) and isinstance(own, dict)):
        return own
    merged = dict(made)
    for key, value in own.items():
        if value is None:
            merged.pop(key, None)
        elif key == "containers" and isinstance(value, list):
            first = made.get(key, [{}])[0].get("name")
            merged[key] = _merge_lists(made.get(key, []), value, first)
        else:
            merged[key] = merge(made[key], value) if key in made else value
    return merged


def _merge_lists(made: list[Any], own: list[Any], default: str | None) -> list[Any]:
    merged = list(made)
    for item in own:
        name = item.get("name", default) if isinstance(item, dict) else None
        same = [i for i, other in enumerate(merged) if name and other.get("name") == name]
        if same:
            merged[same[0]] = merge(merged[same[0]], item)
        elif item not in merged:
            merged.append(item)
    return merged
