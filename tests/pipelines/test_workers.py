"""A real group of two workers: one is killed, the next group ends with an error of its own."""

import os
import signal
import sys
from functools import partial

import pytest
import ray.cloudpickle
from small import Quiet

from stillhouse.actors.worker_group import GroupSize
from stillhouse.errors import ClusterError, DivergedError
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.workers import group_size, run_workers, wait_for_room
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


def test_a_cluster_that_stays_too_small_is_named(ray_cluster, tmp_path):
    compute = ComputeSettings(trainers=64, min_trainers=32, wait_s=0)
    ctx = Context(Store(str(tmp_path)), compute, Quiet())
    size = group_size(compute)
    assert size == GroupSize(64, 32, 1, 0, 1, "cpu", max_failures=2, max_preemptions=100)
    said = r"it needs 32 CPUs for 32 workers, the cluster has 4: add nodes, or lower `compute.tr"
    with pytest.raises(ClusterError, match=said):
        wait_for_room(ctx, size, "it")
