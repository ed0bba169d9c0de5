"""A module as a pure function of one flat parameter vector, as trajectories are stored."""

from collections.abc import Iterable
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class FlatModule:
    """Calls `module` with the parameters that a vector theta [P] holds.

    Tensors lie in theta in the order of `module.named_parameters()`, each flattened row by row;
    shared ones once. Buffers are copied for every call, so that no call leaves a trace. Anything
    random in the module (dropout) must be off, or two calls would be two functions.
    """

    def __init__(self, module: nn.Module) -> None:
        named = dict(module.named_parameters())
        self.names = tuple(named)
        self.shapes = tuple(tuple(parameter.shape) for parameter in named.values())
        self._sizes = [prod(shape) for shape in self.shapes]
        self._module = module

    @property
    def num_parameters(self) -> int:
        """P."""
        return sum(self._sizes)

    def __call__(self, theta: Tensor, *inputs: Any, **options: Any) -> Any:
        """What the module returns for these inputs with the parameters theta [P]."""
        values: dict[str, Tensor] = dict(zip(self.names, self.unflatten(theta), strict=True))
        values |= {name: buffer.clone() for name, buffer in self._module.named_buffers()}
        return functional_call(self._module, values, inputs, options)

    def unflatten(self, theta: Tensor) -> list[Tensor]:
        """The parameters in order, as views of theta [P]."""
        parts = theta.split(self._sizes)
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def parameters(self) -> Tensor:
        """A copy of the module's own parameters [P]."""
        return flatten(self._module.parameters())


def flatten(tensors: Iterable[Tensor]) -> Tensor:
    """One vector of all the tensors' values, detached from them and their graph."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])
