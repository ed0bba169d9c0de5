"""Fresh weights that a seed decides: PyTorch draws them from the process's one generator."""

from collections.abc import Callable
from threading import Lock
from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)
_GENERATOR = Lock()


def initialised(make: Callable[[], Module], seed: int) -> Module:
    """A network made by `make` on the CPU; its weights depend on `make` and the seed alone.

    The generator is left as it was, and one thread at a time has it.
    """
    with _GENERATOR, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return make()
