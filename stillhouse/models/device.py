"""Where a worker computes; apart from the models, so that image workers load none of them."""

import resource
import sys

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


def peak_bytes(device: torch.device) -> int:
    """The most memory this process ever had: on the GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
