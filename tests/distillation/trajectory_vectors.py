"""Vectors, a comparison and a pair of workers that the tests of this folder share."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import torch

VECTORS = Path(__file__).parents[1] / "vectors"


def load(name):
    """The arrays of one vector as tensors; scalars of integer type as ints."""
    arrays = np.load(VECTORS / name)
    return {key: torch.tensor(arrays[key]) for key in arrays.files}


def two_workers(work):
    """[work(rank, all_reduce) for both ranks], in threads that really exchange their sums."""
    barrier, given = Barrier(2), {}

    def on(rank):
        def all_reduce(tensor):
            given[rank] = tensor
            barrier.wait(timeout=10)
            total = given[0] + given[1]
            barrier.wait(timeout=10)
            return total

        return work(rank, all_reduce)

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(on, range(2)))


def relative_error(found, expected):
    return float((found - expected).norm() / expected.norm())
