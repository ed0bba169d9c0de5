"""Model FLOPs utilisation: the share of a device's peak that training puts into the model.

    MFU = 3 * (FLOPs of a forward pass a token) * (tokens a second) / (devices * peak)

What activation checkpointing computes again does not count. Peaks are the makers' figures for
dense bfloat16 products with accumulation in float32.
"""

import torch

_PEAK_TFLOPS = {  # by words of a device's name; the first that fits
    "B200": 2250.0,
    "H200": 989.4,
    "GH200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10G": 70.0,
    "A10": 125.0,
}


def peak_flops(device_name: str) -> float | None:
    """FLOPs a second of a device as torch names it, such as `NVIDIA H200`; None: unknown."""
    words = device_name.replace("-", " ")
    names = (name for name in _PEAK_TFLOPS if f" {name} " in f" {words} ")
    name = next(names, None)
    return None if name is None else _PEAK_TFLOPS[name] * 1e12


def device_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """The peak of this device; None on CPUs, for other types than bfloat16, or where unknown."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    return peak_flops(torch.cuda.get_device_name(device))
