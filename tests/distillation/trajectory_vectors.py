"""Vectors and a comparison that the tests of this folder share."""

from pathlib import Path

import numpy as np
import torch

VECTORS = Path(__file__).parents[1] / "vectors"


def load(name):
    """The arrays of one vector as tensors; scalars of integer type as ints."""
    arrays = np.load(VECTORS / name)
    return {key: torch.tensor(arrays[key]) for key in arrays.files}


def relative_error(found, expected):
    return float((found - expected).norm() / expected.norm())
