"""A training's whole state: tensors, and the rest as JSON values. No pickle."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.training.group import like, whole

WEIGHT = "model."
MOMENT = "optimizer."


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All of a training between two steps: copies on the CPU that training no longer touches.

    Attributes:
        tensors: `model.<parameter>` and `optimizer.<moment>.<parameter>`, whole where they are
            sharded; shared weights are there once.
        progress: JSON values.
    """

    tensors: dict[str, Tensor]
    progress: dict[str, Any]


def take_snapshot(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: dict[str, Any],
    *,
    keep: bool = True,
) -> Snapshot:
    """The state between two steps. Workers of a sharded training call it together.

    Args:
        model, optimizer: as they train.
        progress: JSON values beside them.
        keep: copy the tensors; a worker that only helps to gather them does not.
    """
    tensors: dict[str, Tensor] = {}

    def put(name: str, tensor: Tensor) -> None:
        full = whole(tensor.detach())
        if keep:
            tensors[name] = full.to("cpu", copy=True).contiguous()

    for name, parameter in model.named_parameters():
        put(WEIGHT + name, parameter)
        for key, value in optimizer.state.get(parameter, {}).items():
            put(f"{MOMENT}{key}.{name}", torch.as_tensor(value))  # Adafactor counts in an int
    return Snapshot(tensors, progress)


def put_snapshot(snapshot: Snapshot, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put weights and moments back, sharded where the model is."""
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.copy_(like(snapshot.tensors[WEIGHT + name], parameter))
    put_moments(snapshot.tensors, model, optimizer)


def put_moments(
    tensors: Mapping[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Put the moments among a snapshot's tensors back, sharded where the model is."""
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for full_name, tensor in tensors.items():
        if full_name.startswith(MOMENT):
            key, name = full_name.removeprefix(MOMENT).split(".", 1)
            optimizer.state[parameters[name]][key] = like(tensor, parameters[name]).clone()
