import pytest
import torch

from stillhouse.errors import SpecError
from stillhouse.models.causal_lm import choose_dtype
from stillhouse.models.device import choose_device, peak_flops, use_onednn_for_float32

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_auto_follows_the_device() -> None:
    assert choose_device("auto", 0) == CPU == choose_device("cpu", 1)
    assert choose_dtype("auto", CPU) == torch.float32 == choose_dtype("float32", CUDA)
    assert choose_dtype("auto", CUDA) == torch.bfloat16 == choose_dtype("bfloat16", CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize(("device", "gpus"), [("auto", 1), ("cuda", 0), ("cuda", 1)])
def test_cuda_without_a_gpu_is_refused(device: str, gpus: float) -> None:
    with pytest.raises(SpecError, match=r"compute\.gpus_per_worker"):
        choose_device(device, gpus)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10G", 70),
    ],
)
def test_peak_flops(name: str, tflops: float) -> None:
    assert peak_flops(name) == tflops * 1e12


@pytest.mark.parametrize("name", ["NVIDIA GeForce GTX 1080", "cpu"])
def test_peak_flops_of_other_devices_are_unknown(name: str) -> None:
    assert peak_flops(name) is None


def test_float32_products_stay_exact() -> None:
    use_onednn_for_float32()
    left = torch.randn(300, 400, generator=torch.Generator().manual_seed(1))
    assert (left @ left.T - left.double() @ left.double().T).abs().max() < 1e-3
