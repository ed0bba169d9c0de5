"""The device of a process: which one, its memory and peak speed, and weights drawn from a seed.

Without transformers, which image workers never load.
"""

import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from threading import Lock
from typing import Any, TypeVar

import torch
from torch import nn

from stillhouse.compute_settings import device_type
from stillhouse.errors import SpecError

Module = TypeVar("Module", bound=nn.Module)
_GENERATOR = Lock()
_EXACT = 1e-4  # in the probe below float32 errs by 1e-5, bfloat16 by 1e-1
_PEAK_TFLOPS = {  # dense bfloat16 with float32 accumulation; the first name found in a device's
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


def choose_device(device: str, gpus: float) -> torch.device:
    """The torch device for `compute.device` and GPUs per worker; the current one of several.

    Raises:
        SpecError: cuda, and this process sees no GPU.
    """
    if device_type(device, gpus) == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SpecError(
            f"`compute.device` is {device!r} with {gpus:g} GPUs a worker, but this process sees no "
            "GPU: set `compute.gpus_per_worker` to 0 for the CPU, or to 1 on machines with GPUs"
        )
    return torch.device("cuda", torch.cuda.current_device())


def device_name(device: torch.device) -> str:
    """`cpu`, or the GPU's model: models differ in how they round."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_flops(name: str) -> float | None:
    """Peak bfloat16 FLOPs a second of a device by name, such as `NVIDIA H200`; None: unknown."""
    spaced = f" {name.replace('-', ' ')} "
    return next((peak * 1e12 for key, peak in _PEAK_TFLOPS.items() if f" {key} " in spaced), None)


def peak_bytes(device: torch.device) -> int:
    """Peak memory since `reset_peak`: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak(device: torch.device) -> None:
    """Reset `peak_bytes`; on the CPU this works on Linux only."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


@cache
def use_onednn_for_float32() -> bool:
    """Use oneDNN for this process's float32 matrix products on the CPU, if it keeps them exact.

    PyTorch uses MKL, which runs at half the vector width on AMD processors (`benchmarks/kernel.py`
    measures it). The switch allows oneDNN to multiply in bfloat16, which it does on some
    processors (AMX); a probe detects that and restores the setting.

    Returns:
        Whether oneDNN is used.
    """
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(256, 128, generator=generator)
    right = torch.randn(128, 256, generator=generator)
    expected = left.double() @ right.double()
    switch: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before = switch.fp32_precision
    switch.fp32_precision = "bf16"
    exact = bool((left @ right - expected).abs().max() < _EXACT)
    if not exact:
        switch.fp32_precision = before
    return exact


def initialised(make: Callable[[], Module], seed: int) -> Module:
    """A network built on the CPU by `make`, with weights that depend on `make` and `seed` alone.

    PyTorch initialises from the process's global generator: it is locked, seeded and restored.
    """
    with _GENERATOR, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return make()
