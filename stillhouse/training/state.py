"""A training's whole state as bytes: tensors as safetensors, the rest as JSON. No pickle."""

import json
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

_WEIGHT = "model."
_MOMENT = "optimizer."


@dataclass(frozen=True, slots=True)
class TrainingState:
    """`tensors`: safetensors (weights and the optimiser's moments); `progress`: JSON."""

    tensors: bytes
    progress: bytes


def pack_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any]
) -> TrainingState:
    """The state of a training between two steps. Shared weights are kept once."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[_WEIGHT + name] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{_MOMENT}{key}.{name}"] = value
    on_cpu = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    return TrainingState(save(on_cpu), json.dumps(progress, sort_keys=True).encode())


def unpack_state(
    state: TrainingState, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Put weights and moments back; returns the progress."""
    tensors = load(state.tensors)
    optimizer.state.clear()
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.copy_(tensors.pop(_WEIGHT + name))
    parameters = dict(model.named_parameters())
    for full_name, tensor in tensors.items():
        key, name = full_name.removeprefix(_MOMENT).split(".", 1)
        parameter = parameters[name]
        optimizer.state[parameter][key] = tensor.to(parameter.device)
    return json.loads(state.progress)
