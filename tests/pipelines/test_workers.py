"""A real group of two workers: one is killed, the next group ends with an error of its own."""

import json
import os
import signal
import sys
from functools import partial

import pytest
import ray
import ray.cloudpickle
from small import Quiet

from stillhouse.distillation.matching_task import MatchingTask
from stillhouse.distillation.methods.mtt import Mtt
from stillhouse.distillation.prepared import ImageHostSettings, Preparation
from stillhouse.errors import ClusterError, DivergedError
from stillhouse.models.network_settings import NetworkSettings
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.distill import distil
from stillhouse.pipelines.workers import room, run_workers
from stillhouse.spec import ComputeSettings
from stillhouse.storage.artifact import Store


def work(killed, tell):
    import torch
    from torch import distributed

    total = torch.ones(1)
    distributed.all_reduce(total)
    if distributed.get_rank() == 1 and not killed.exists():
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.barrier()
    if distributed.get_rank() == 0:
        tell("sum", {"of": total.item(), "threads": torch.get_num_threads()})
    distributed.barrier()
    raise DivergedError("the loss left")


@pytest.mark.soak
def test_a_lost_worker_is_replaced_and_an_error_arrives_as_it_was_raised(ray_cluster, tmp_path):
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ctx = Context(Store(str(tmp_path)), ComputeSettings(trainers=2), Quiet())
    heard = []
    with pytest.raises(DivergedError, match=r"^the loss left$"):
        run_workers(
            ctx, "it", partial(work, tmp_path / "killed"), lambda kind, said: heard.append(said)
        )
    assert heard == [{"of": 2.0, "threads": 1}]


class Asked(Quiet):
    """Keeps what the autoscaler is asked for whenever something is noted."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def note(self, kind, content):
        self.seen.append((kind, content["message"], asked_of_autoscaler()))


def asked_of_autoscaler():
    from ray.autoscaler.v2.sdk import get_cluster_status
    from ray.autoscaler.v2.utils import is_autoscaler_v2
    from ray.experimental.internal_kv import _internal_kv_get

    if not is_autoscaler_v2():
        return json.loads(_internal_kv_get("autoscaler_resource_request") or b"[]")
    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    demands = status.resource_demands.cluster_constraint_demand
    return [
        bundle.bundle
        for demand in demands
        for bundle in demand.bundles_by_count
        for _ in range(bundle.count)
    ]


@pytest.mark.parametrize("beside", [0, 3])
def test_a_cluster_that_stays_too_small_is_named_and_asked_for_no_longer(
    ray_cluster, tmp_path, beside
):
    compute = ComputeSettings(trainers=64, min_trainers=32, wait_s=0.1)
    ctx = Context(Store(str(tmp_path)), compute, Asked())
    scorers = ", scorers included" if beside else ""
    said = (
        f"it needs {32 + beside} CPUs for 32 workers{scorers}, the cluster has 4: add nodes, or "
        "lower `compute.trainers`"
    )
    held = {"CPU": beside, "GPU": 0}
    with pytest.raises(ClusterError, match=said), room(ctx, "it", held, "compute.trainers"):
        raise AssertionError
    assert ctx.listener.seen == [("waiting", said, [{"CPU": 1}] * 64)]
    assert asked_of_autoscaler() == []


def test_distillers_that_never_fit_together_are_named(ray_cluster, tmp_path):
    compute = ComputeSettings(distillers=5, wait_s=0)
    ctx = Context(Store(str(tmp_path)), compute, Quiet())
    given, method = Preparation("1" * 64, False), Mtt(name="mtt", images_per_class=1)
    task = MatchingTask(given, NetworkSettings(), method, (), 3, ())
    said = (
        r"the distillation needs 5 CPUs for 5 workers, .* has 4: .* or lower `compute.distillers`"
    )
    with pytest.raises(ClusterError, match=said):
        distil(ctx, task, ImageHostSettings(given))
