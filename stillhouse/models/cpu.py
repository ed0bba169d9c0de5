"""A choice that decides how quick small float32 models are on CPUs; it does not change precision.

PyTorch gives float32 matrix products to MKL, which uses half the vector width on AMD processors.
`benchmarks/kernel.py` shows the effect.
"""

from functools import cache
from typing import Any

import torch

_EXACT = 1e-4  # float32 errs by 1e-5 in the probe below, bfloat16 by 1e-1


@cache
def use_onednn_for_float32() -> bool:
    """Send this process's float32 products on the CPU to oneDNN where that keeps them exact.

    The switch allows oneDNN to multiply in bfloat16, which it does on some processors (AMX) and
    not on others. A probe tells; where products would be rounded, everything stays as it was.

    Returns:
        Whether oneDNN is used from now on.
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
