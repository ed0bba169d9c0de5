"""What no node can hold is refused at once; the words of the refusal say what exists."""

import pytest

from stillhouse.compute_settings import device_type, group_backend
from stillhouse.errors import ClusterError
from stillhouse.pipelines.placement import NodeType, actor_options, check_placement
from stillhouse.spec import ComputeSettings

SPOT = {"ray.io/market-type": "spot"}
H100 = NodeType("gpu", {"CPU": 16, "GPU": 8, "accelerator_type:H100": 1}, SPOT)


def test_scorers_and_trainers_have_needs_of_their_own():
    compute = ComputeSettings.model_validate(
        {
            "gpus_per_worker": 1,
            "scorer": {"gpus": 0.25, "labels": SPOT},
            "trainer": {"accelerator": "H100"},
        }
    )
    assert actor_options(compute, compute.scorer) == {
        "num_cpus": 0,
        "num_gpus": 0.25,
        "label_selector": SPOT,
    }
    assert actor_options(compute, compute.trainer) == {
        "num_cpus": 0,
        "num_gpus": 1,
        "accelerator_type": "H100",
    }
    plain = ComputeSettings(cpus_per_worker=2)
    assert actor_options(plain, plain.scorer) == {"num_cpus": 2, "num_gpus": 0}


@pytest.mark.parametrize(
    ("device", "gpus", "computes", "sums"),
    [
        ("auto", 0, "cpu", "gloo"),
        ("auto", 1, "cuda", "nccl"),
        ("auto", 0.5, "cuda", "gloo"),  # NCCL takes no two ranks on one GPU
        ("cpu", 1, "cpu", "gloo"),
        ("cuda", 0, "cuda", "gloo"),  # all of them may be on one
        ("cuda", 2, "cuda", "nccl"),
    ],
)
def test_the_device_decides_where_and_how(device, gpus, computes, sums):
    assert device_type(device, gpus) == computes
    assert group_backend(computes, gpus) == sums


@pytest.mark.parametrize("device", ["mps", "xpu", "cuda:1", "gpu", 1])
def test_other_devices_are_refused(device):
    with pytest.raises(ValueError, match=r"Ray gives|'auto', 'cpu' or 'cuda'"):
        ComputeSettings(device=device)


@pytest.mark.parametrize(
    ("need", "labels", "holds"),
    [
        ({"GPU": 8, "CPU": 16}, {}, True),
        ({"GPU": 9}, {}, False),
        ({"accelerator_type:H100": 0.001}, {}, True),
        ({"accelerator_type:A10G": 0.001}, {}, False),
        ({}, SPOT, True),
        ({}, {"ray.io/market-type": "on-demand"}, False),
        ({}, {"ray.io/market-type": "!on-demand"}, True),
        ({}, {"ray.io/market-type": "in(on-demand, spot)"}, True),
        ({}, {"ray.io/market-type": "!in(on-demand,spot)"}, False),
        ({}, {"pool": "mine"}, False),
    ],
)
def test_what_a_node_holds(need, labels, holds):
    assert H100.holds(need, labels) == holds


def test_a_node_says_what_it_is():
    assert str(H100) == "gpu: 16 CPUs, 8 GPUs, H100, ray.io/market-type=spot"


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"gpus_per_worker": 1}, "hold a scorer (1 GPUs); it has: node: 4 CPUs, 0 GPUs"),
        ({"cpus_per_worker": 5}, "hold a scorer (5 CPUs)"),
        ({"trainer": {"accelerator": "H100"}}, "hold a trainer (1 CPUs, H100)"),
        ({"trainer": {"labels": {"pool": "x"}}}, "hold a trainer (1 CPUs, pool=x)"),
    ],
)
def test_what_never_can_be_is_refused(ray_cluster, asked, says):
    with pytest.raises(ClusterError) as refused:
        check_placement(ComputeSettings.model_validate(asked), print)
    assert says in str(refused.value)


def test_what_can_be_is_not(ray_cluster):
    check_placement(ComputeSettings(cpus_per_worker=4), print)
