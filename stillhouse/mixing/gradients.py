"""Gradients of a few named parameters, kept apart by arm, while training accumulates as usual.

A hook on each parameter sees the gradient of one backward pass before it is added to `.grad`, so an
arm's gradient is never a difference of accumulated ones, which loses its digits in bfloat16. Under
DDP the hook runs before the reduction: what it sees is this worker's own.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from transformers import PreTrainedModel

from stillhouse.errors import ModelError


def output_head(model: PreTrainedModel) -> dict[str, Parameter]:
    """The output projection, what FLAD's released runs compare; {name: [V, H]}.

    Where it is tied to the input embeddings, its gradient holds both uses.
    """
    weight = model.get_output_embeddings().weight  # pyright: ignore[reportOptionalMemberAccess]
    return {name: value for name, value in model.named_parameters() if value is weight}


def named_parameters(model: nn.Module, part: str) -> dict[str, Parameter]:
    """Trained parameters whose name contains `part`, in the model's order.

    Raises:
        ModelError: there is none.
    """
    found = {
        name: value
        for name, value in model.named_parameters()
        if part in name and value.requires_grad
    }
    if not found:
        names = (name.rsplit(".", 2)[-2] for name, _ in model.named_parameters() if "." in name)
        known = ", ".join(dict.fromkeys(names))
        raise ModelError(
            f"no trained parameter's name contains {part!r}: set `policy.parameters` to "
            f"`output_head` or to a part of a name with one of {known}"
        )
    return found


class GradientCapture:
    """Sums each arm's gradients of `parameters` in float32, until it is dropped.

    Memory: 4 bytes a value of the subset for each arm of the window. `close` removes the hooks.
    """

    def __init__(self, parameters: Mapping[str, Parameter]) -> None:
        self._parameters = list(parameters.values())
        self._sums: dict[int, list[Tensor | None]] = {}
        self._arm: int | None = None
        self._hooks = [
            parameter.register_hook(partial(self._hear, index=index))
            for index, parameter in enumerate(self._parameters)
        ]

    @contextmanager
    def arm(self, arm: int) -> Generator[None, None, None]:
        """A micro-batch of one arm: the one backward pass inside is credited to it."""
        self._sums.setdefault(arm, [None] * len(self._parameters))
        self._arm = arm
        try:
            yield
        finally:
            self._arm = None

    def total(self, arm: int) -> Tensor:
        """Sum of the arm's gradients: float32[P], the parameters flattened one after the other.

        Zeros for an arm that was not seen.
        """
        sums = self._sums.get(arm) or [None] * len(self._parameters)
        parts = [
            torch.zeros(parameter.numel(), device=parameter.device) if found is None else found
            for parameter, found in zip(self._parameters, sums, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def drop(self, arm: int) -> None:
        """Forget one arm."""
        self._sums.pop(arm, None)

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def _hear(self, gradient: Tensor, index: int) -> None:
        if self._arm is None:
            return
        flat, sums = gradient.detach().flatten(), self._sums[self._arm]
        found = sums[index]
        if found is None:
            sums[index] = flat.to(torch.float32, copy=True)
        else:
            found += flat
