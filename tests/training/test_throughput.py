import pytest
import torch

from stillhouse.training.throughput import device_peak, peak_flops


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
def test_peaks(name, tflops):
    assert peak_flops(name) == tflops * 1e12


def test_unknown_devices_have_no_peak():
    assert peak_flops("NVIDIA GeForce GTX 1080") is None
    assert device_peak(torch.device("cpu"), torch.bfloat16) is None
