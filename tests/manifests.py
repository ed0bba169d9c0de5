"""Checks Kubernetes objects offline: core ones by their strict schemas, Ray's by documented fields.

The pod templates inside Ray's objects are core objects again and checked as pods, which have to
meet the restricted Pod Security Standard too, as Kubernetes' documentation lists it. The tables
hold the fields of KubeRay's API reference as far as the project may use them: (type, required).
"""

import re

import kubernetes_validate

KUBERNETES = ("1.31", "1.34")
DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?(m|[kMGTPE]i?)?")

GROUP = {"rayStartParams": (dict, True), "template": (dict, True)}
AUTOSCALER = {
    "version": (str, False),
    "idleTimeoutSeconds": (int, False),
    "upscalingMode": (str, False),
    "image": (str, False),
    "imagePullPolicy": (str, False),
    "resources": (dict, False),
    "env": (list, False),
    "securityContext": (dict, False),
}
CLUSTER = {
    "rayVersion": (str, True),
    "headGroupSpec": (dict, True),
    "workerGroupSpecs": (list, False),
    "enableInTreeAutoscaling": (bool, False),
    "autoscalerOptions": (dict, False),
    "authOptions": (dict, False),
    "gcsFaultToleranceOptions": (dict, False),
    "suspend": (bool, False),
}
HEAD = GROUP | {"serviceType": (str, False), "enableIngress": (bool, False)}
WORKERS = GROUP | {
    "groupName": (str, True),
    "replicas": (int, False),
    "minReplicas": (int, True),
    "maxReplicas": (int, True),
    "numOfHosts": (int, False),
    "idleTimeoutSeconds": (int, False),
}
JOB = {
    "entrypoint": (str, True),
    "rayClusterSpec": (dict, True),
    "activeDeadlineSeconds": (int, False),
    "backoffLimit": (int, False),
    "entrypointNumCpus": (float, False),
    "metadata": (dict, False),
    "runtimeEnvYAML": (str, False),
    "shutdownAfterJobFinishes": (bool, False),
    "submissionMode": (str, False),
    "submitterPodTemplate": (dict, False),
    "suspend": (bool, False),
    "ttlSecondsAfterFinished": (int, False),
}
CRON = {
    "schedule": (str, True),
    "timeZone": (str, False),
    "jobTemplate": (dict, True),
    "suspend": (bool, False),
}
VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "projected", "secret"}
START_PARAMS = {
    "num-cpus",
    "num-gpus",
    "resources",
    "labels",
    "dashboard-host",
    "metrics-export-port",
}


def check_objects(documents):
    """Raises AssertionError or ValidationError at what a cluster would refuse."""
    for found in documents:
        assert DNS_LABEL.fullmatch(found["metadata"]["name"])
        if found["apiVersion"] == "ray.io/v1":
            assert set(found) == {"apiVersion", "kind", "metadata", "spec"}
            _check_core({"apiVersion": "v1", "kind": "ConfigMap", "metadata": found["metadata"]})
            RAY_KINDS[found["kind"]](found["spec"])
        else:
            _check_core(found)
            if found["kind"] == "CronJob":
                _check_pod(found["spec"]["jobTemplate"]["spec"]["template"])


def _check_core(found):
    for version in KUBERNETES:
        kubernetes_validate.validate(found, version, strict=True)


def _check_fields(spec, fields, place):
    unknown = set(spec) - set(fields)
    assert not unknown, f"{place}: unknown {unknown}"
    for name, (kind, required) in fields.items():
        assert name in spec or not required, f"{place}: {name} is missing"
        if name in spec:
            assert type(spec[name]) is kind, f"{place}.{name}: {spec[name]!r} is no {kind}"


def _check_cluster(spec):
    _check_fields(spec, CLUSTER, "cluster")
    auth = spec.get("authOptions", {})
    assert set(auth) <= {"mode"} and auth.get("mode", "token") in {"token", "disabled"}
    scaler = spec.get("autoscalerOptions", {})
    _check_fields(scaler, AUTOSCALER, "autoscalerOptions")
    assert scaler.get("version", "v2") in {"v1", "v2"}
    security = scaler["securityContext"]  # KubeRay puts the autoscaler beside the head
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert scaler.get("upscalingMode", "Default") in {"Default", "Aggressive", "Conservative"}
    _check_fields(spec["headGroupSpec"], HEAD, "head")
    _check_group(spec["headGroupSpec"])
    names = [group["groupName"] for group in spec.get("workerGroupSpecs", [])]
    assert len(names) == len(set(names))
    for group in spec.get("workerGroupSpecs", []):
        _check_fields(group, WORKERS, "workers")
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert DNS_LABEL.fullmatch(group["groupName"])
        _check_group(group)


def _check_group(group):
    params = group["rayStartParams"]
    assert set(params) <= START_PARAMS
    assert all(isinstance(value, str) for value in params.values()), "start params are strings"
    _check_pod(group["template"])
    for container in group["template"]["spec"]["containers"]:
        amounts = container["resources"]
        for value in [*amounts["requests"].values(), *amounts["limits"].values()]:
            assert QUANTITY.fullmatch(value), value


def _check_pod(template):
    assert set(template) <= {"metadata", "spec"}
    metadata = {"name": "x"} | template.get("metadata", {})
    _check_core({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]})
    check_restricted(template["spec"])


def check_restricted(pod):
    """Raises AssertionError where the restricted Pod Security Standard would refuse a pod."""
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    assert all(set(volume) - {"name"} <= VOLUMES for volume in pod.get("volumes", []))
    mounted = {volume["name"] for volume in pod.get("volumes", [])}
    for container in [*pod["containers"], *pod.get("initContainers", [])]:
        security = pod.get("securityContext", {}) | container["securityContext"]
        assert security["runAsNonRoot"] is True and security["runAsUser"] > 0
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert security["allowPrivilegeEscalation"] is False and not security.get("privileged")
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert {mount["name"] for mount in container.get("volumeMounts", [])} <= mounted


def _check_job(spec):
    _check_fields(spec, JOB, "job")
    _check_cluster(spec["rayClusterSpec"])
    _check_pod(spec["submitterPodTemplate"])
    if spec.get("ttlSecondsAfterFinished"):
        assert spec["shutdownAfterJobFinishes"], "the time to live counts only with shutdown"


def _check_cron_job(spec):
    _check_fields(spec, CRON, "cron job")
    _check_job(spec["jobTemplate"])


RAY_KINDS = {"RayCluster": _check_cluster, "RayJob": _check_job, "RayCronJob": _check_cron_job}
