"""Where a job's actors may run, and whether the cluster has or can start such nodes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray

from stillhouse.compute_settings import ComputeSettings, WorkerSettings
from stillhouse.errors import ClusterError

_EPSILON = 1e-6
_GROUP = "ray.io/node-group"
"""A label of nodes that KubeRay or the cluster launcher started."""


def actor_options(compute: ComputeSettings, worker: WorkerSettings) -> dict[str, Any]:
    """Ray's options for an actor: resources, accelerator, and a selector of node labels."""
    options: dict[str, Any] = {**compute.resources(compute.gpus_of(worker))}
    if worker.accelerator is not None:
        options["accelerator_type"] = worker.accelerator
    if worker.labels:
        options["label_selector"] = worker.labels
    return options


def num_cpus() -> float:
    return ray.cluster_resources().get("CPU", 1)


@dataclass(frozen=True, slots=True)
class NodeType:
    """Resources and labels of a node that is alive, or that the autoscaler can start."""

    name: str
    resources: Mapping[str, float]
    labels: Mapping[str, str]

    def holds(self, need: Mapping[str, float], labels: Mapping[str, str]) -> bool:
        enough = all(self.resources.get(k, 0) + _EPSILON >= n for k, n in need.items())
        return enough and all(_matches(self.labels.get(k), value) for k, value in labels.items())

    def __str__(self) -> str:
        accelerator = "".join(
            f", {name.removeprefix('accelerator_type:')}"
            for name in sorted(self.resources)
            if name.startswith("accelerator_type:")
        )
        counts = ", ".join(f"{self.resources.get(name, 0):g} {name}s" for name in ("CPU", "GPU"))
        labels = "".join(f", {k}={v}" for k, v in sorted(self.labels.items()) if "/" in k)
        return f"{self.name}: {counts}{accelerator}{labels}"


def _matches(found: str | None, wanted: str) -> bool:
    """Match one value of Ray's label selectors: `x`, `!x`, `in(x,y)` or `!in(x,y)`."""
    negated, value = wanted.startswith("!"), wanted.removeprefix("!")
    names = value[3:-1].split(",") if value.startswith("in(") else [value]
    return (found in [name.strip() for name in names]) != negated


def check_placement(compute: ComputeSettings, say: Callable[[str], object]) -> None:
    """Refuse a job whose actors no node can ever hold; Ray would wait for ever.

    Where an autoscaler may start nodes of unknown kinds, one that holds the actor is requested and
    waited for up to `compute.wait_s` seconds; `say` gets a message about it.

    Raises:
        ClusterError: naming what is needed and what exists.
    """
    for key, worker in (("scorer", compute.scorer), ("trainer", compute.trainer)):
        options = actor_options(compute, worker)
        need = {"CPU": options["num_cpus"], "GPU": options["num_gpus"]}
        if worker.accelerator is not None:
            need[f"accelerator_type:{worker.accelerator}"] = 0.001
        types = node_types()
        if any(kind.holds(need, worker.labels) for kind in types):
            continue
        needs = [f"{count:g} {name}s" for name, count in need.items() if count and ":" not in name]
        needs += [worker.accelerator] if worker.accelerator else []
        needs += [f"{k}={v}" for k, v in worker.labels.items()]
        what, tried = f"a {key} ({', '.join(needs)})", ""
        if can_grow():
            say(f"no node can hold {what}: requesting one from the autoscaler")
            if _comes(options, compute.wait_s):
                continue
            tried = f", and none came within {compute.wait_s:g} s (`compute.wait_s`)"
        nodes = "; ".join(sorted({str(kind) for kind in types}))
        raise ClusterError(
            f"no node of this cluster can ever hold {what}; it has: {nodes}{tried}. Set "
            f"`compute.{key}`, or `compute.gpus_per_worker`"
        )


def can_grow() -> bool:
    """Whether nodes may be added: by the autoscaler (v2), or by what labelled the node groups."""
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    grouped = any(_GROUP in (node.get("Labels") or {}) for node in ray.nodes())
    return grouped or is_autoscaler_v2(fetch_from_server=True)


def _comes(options: Mapping[str, Any], wait_s: float) -> bool:
    """Whether a task with an actor's resources finds a node in time."""
    probe: Any = ray.remote(**options)(int).remote()
    ready = bool(ray.wait([probe], timeout=wait_s)[0])
    if not ready:
        ray.cancel(probe, force=True)
    return ready


def node_types() -> list[NodeType]:
    """The nodes that are alive, and the autoscaler's node groups, where it reports them."""
    from ray._private.state import state  # there is no public call

    alive = [
        NodeType("node", node["Resources"], node.get("Labels") or {})
        for node in ray.nodes()
        if node["Alive"]
    ]
    config = state.get_cluster_config()
    groups: list[Any] = list(config.node_group_configs) if config is not None else []
    return alive + [
        NodeType(str(group.name), dict(group.resources), dict(group.labels))
        for group in groups
        if group.max_count != 0
    ]
