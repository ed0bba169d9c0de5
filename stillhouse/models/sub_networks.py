"""Sub-networks of a Llama or Qwen3: the leading rows and columns of every matrix, the first layers.

Heads keep their width, so that q, k and v of a sub-network have the first heads' rows. They run on
the super-network's own parameters, whose gradients are 0 outside of the slices; `extract` copies
one into a model of its own.
"""

import copy
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from stillhouse.errors import SpecError
from stillhouse.models.shape import ModelShape

ARCHITECTURES = ("llama", "qwen3")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True, slots=True, order=True)
class SubNetwork:
    """The sizes of a student; its MLP is `mlp_ratio * hidden` wide."""

    layers: int
    heads: int
    hidden: int
    mlp_ratio: float


def sub_config(config: PreTrainedConfig, size: SubNetwork) -> Any:
    """The configuration of a sub-network.

    Raises:
        SpecError: it is larger than the whole in some size, or its heads do not share whole groups
            of keys and values.
    """
    whole, mlp = own_size(config), round(size.mlp_ratio * size.hidden)
    made: Any = copy.deepcopy(config)
    group = made.num_attention_heads // made.num_key_value_heads
    large = size.layers > whole.layers or size.heads > whole.heads or size.hidden > whole.hidden
    if large or mlp > made.intermediate_size:
        raise SpecError(f"{size} is larger than the super-network {whole}")
    if size.heads % group:
        raise SpecError(f"{size}: {group} heads share keys and values: use a multiple of {group}")
    made.head_dim = head_width(config)
    made.num_hidden_layers, made.num_attention_heads = size.layers, size.heads
    made.num_key_value_heads = size.heads // group
    made.hidden_size, made.intermediate_size = size.hidden, mlp
    if getattr(made, "layer_types", None):
        made.layer_types = made.layer_types[: size.layers]
    return made


def own_size(config: Any) -> SubNetwork:
    """The super-network as the largest of its sub-networks."""
    return SubNetwork(
        config.num_hidden_layers,
        config.num_attention_heads,
        config.hidden_size,
        config.intermediate_size / config.hidden_size,
    )


def head_width(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def shape_of(config: PreTrainedConfig, size: SubNetwork) -> ModelShape:
    """Its shape, without building it."""
    made = sub_config(config, size)
    attention = size.heads * made.head_dim
    keys = made.num_key_value_heads * made.head_dim
    layer = size.hidden * (2 * attention + 2 * keys + 3 * made.intermediate_size)
    return ModelShape(
        architecture=made.model_type,
        hidden_size=size.hidden,
        vocab_size=made.vocab_size,
        max_positions=made.max_position_embeddings,
        matmul_parameters=size.layers * layer + made.vocab_size * size.hidden,
        attention_width=size.layers * attention,
    )


class SubModel:
    """The body of a sub-network, run on the parameters of its super-network.

    It has the code of transformers on the `meta` device, and is given slices of parameters for each
    call, so that the largest sub-network computes the very bits of the whole model.
    """

    def __init__(self, config: PreTrainedConfig, size: SubNetwork) -> None:
        with torch.device("meta"):
            self.body: Any = AutoModel.from_config(sub_config(config, size))
        self.size = size

    def states(self, model: PreTrainedModel, input_ids: Tensor) -> Tensor:
        """Last hidden states [B, T, h] of token ids [B, T], BOS included."""
        whole: Any = model.base_model
        kernel = model.config._attn_implementation  # pyright: ignore[reportPrivateUsage]
        if self.body.config._attn_implementation != kernel:
            self.body.set_attn_implementation(kernel)
        self.body.train(model.training)
        tensors = leading(dict(whole.named_parameters()), self.body)
        tensors |= dict(whole.named_buffers())
        given = {"input_ids": input_ids, "use_cache": False}
        return functional_call(self.body, tensors, (), given).last_hidden_state


def leading(parameters: Mapping[str, Tensor], body: torch.nn.Module) -> dict[str, Tensor]:
    """The slices of a super-network's parameters that the parameters of a sub-network are."""
    return {
        name: parameters[name][tuple(slice(0, size) for size in small.shape)]
        for name, small in body.named_parameters()
    }


def extract(model: PreTrainedModel, size: SubNetwork) -> PreTrainedModel:
    """A copy of a sub-network as a plain float32 model on the CPU, for `save_model`."""
    small = AutoModelForCausalLM.from_config(sub_config(model.config, size), dtype=torch.float32)
    with torch.no_grad():
        for name, values in leading(dict(model.named_parameters()), small).items():
            small.get_parameter(name).copy_(values)
    return small


@contextmanager
def projections(body: Any) -> Generator[list[Tensor]]:
    """Keeps Q, K and V [B, T, W] of the last layer of a body, as its next run computes them.

    Raises:
        SpecError: the architecture has no such projections.
    """
    attention = getattr(body.layers[-1], "self_attn", None) if hasattr(body, "layers") else None
    parts = [getattr(attention, name, None) for name in _PROJECTIONS]
    if None in parts:
        raise SpecError(
            f"the architecture {body.config.model_type!r} has no separate projections of queries, "
            "keys and values in `layers[-1].self_attn`"
        )
    found: list[Tensor] = []
    hooks = [part.register_forward_hook(lambda _, __, out: found.append(out)) for part in parts]  # pyright: ignore
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
