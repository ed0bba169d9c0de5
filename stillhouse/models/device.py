"""Where a worker computes; apart from the models, so that image workers load none of them."""

import resource
import sys
from contextlib import suppress

import torch

from stillhouse.compute_settings import device_type
from stillhouse.errors import SpecError


def choose_device(device: str, gpus: float) -> torch.device:
    """The torch device of `device_type`; of several GPUs that torch sees, its current one.

    Raises:
        SpecError: cuda, and this process sees none.
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
    """`cpu`, or a GPU's model: others round otherwise."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_bytes(device: torch.device) -> int:
    """The most memory since `reset_peak`, on the GPU, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak(device: torch.device) -> None:
    """Let `peak_bytes` begin anew, at the start of a task; on the CPU Linux alone can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")
