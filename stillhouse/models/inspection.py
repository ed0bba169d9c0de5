"""Inspecting a given model without reading its weights: its configuration and its files' headers.

The architecture is built on torch's `meta` device, where a model of any size takes no memory, and
transformers loads placeholders for the weights into it: a checkpoint that lacks some, or has other
names for them, is refused before any work.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from stillhouse.errors import ModelError
from stillhouse.models.head import logit_rule
from stillhouse.models.masked_lm import is_masked_model, masked_logits
from stillhouse.models.shape import ModelHeader, ModelShape

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")
_PREDICTED = 0.15  # of the tokens, by masked models
_ATTENTION = {"attention", "full_attention", "sliding_attention", "chunked_attention", "hybrid"}


def inspect_model(
    header: ModelHeader,
    *,
    encoder_decoder: bool = False,
    check: Callable[[PreTrainedModel], object] | None = None,
) -> ModelShape:
    """Check a model and return its shape.

    Args:
        header: of its folder.
        encoder_decoder: whether it must be a text-to-text model; else a decoder to score with, or a
            masked language model.
        check: is given the model without its weights; what it raises is raised.

    Raises:
        ModelError: a model of the other kind; weights that are missing or under other names; an
            architecture whose logits are unknown (`logit_rule`).
    """
    what, config = header.what, _config(header)
    if config.is_encoder_decoder != encoder_decoder:
        kinds = ("encoder_decoder", "decoder")
        other, kind = kinds if config.is_encoder_decoder else kinds[::-1]
        raise ModelError(f"{what} is no {kind} ({config.model_type}): set `model.kind: {other}`")
    kind: Any = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
    masked = header.masked and not encoder_decoder
    model = _on_meta(config, what, AutoModelForMaskedLM if masked else kind)
    _check_weights(header, model)
    if not encoder_decoder:
        try:
            if masked:
                width = config.get_text_config().hidden_size
                masked_logits(model, torch.zeros(1, width, device="meta"))
            else:
                logit_rule(model)
        except ModelError as error:
            raise ModelError(f"{what}: {error}") from None
    if check is not None:
        check(model)
    return model_shape(model)


def _config(header: ModelHeader) -> PreTrainedConfig:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_bytes(header.config)
        try:
            config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # whatever an architecture's code raises
            reason = _line(error).replace(folder, "it")
            raise ModelError(f"{header.what}: its config.json cannot be used: {reason}") from error
    if getattr(config, "quantization_config", None):
        raise ModelError(f"{header.what} is quantised: give its weights in bfloat16 or float32")
    return config


def _on_meta(config: PreTrainedConfig, what: str, kind: Any) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            return kind.from_config(config)
    except Exception as error:
        raise ModelError(
            f"{what}: transformers make no language model of {config.model_type!r}: {_line(error)}"
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _check_weights(header: ModelHeader, model: PreTrainedModel) -> None:
    stored = {
        name: torch.zeros((), dtype=torch.bfloat16).expand(shape)
        for name, shape in header.shapes.items()
    }
    kind: Any = type(model)
    try:
        _, info = kind.from_pretrained(
            None,
            config=model.config,
            state_dict=stored,
            dtype=torch.bfloat16,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:
        raise ModelError(f"{header.what}: its weights do not load: {_line(error)}") from error
    check_loaded(info, header.what, masked=is_masked_model(model))


def check_loaded(info: dict[str, Any], what: str, *, masked: bool = False) -> None:
    """Refuse a model of which transformers initialised weights at random, or ignored some.

    Beside masked language models other heads are stored, such as BERT's pooler: these are left out.

    Args:
        info: transformers' loading info; tied weights are not missing.
        what: name of the model for the error.
        masked: a masked language model.

    Raises:
        ModelError: names the first such weight and their number.
    """
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if masked and not missing:
        unexpected = []
    if missing or unexpected:
        found = [
            f"{text}: {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else "")
            for text, names in (
                ("not in the file", missing),
                ("in the file, but not in the architecture", unexpected),
            )
            if names
        ]
        raise ModelError(
            f"{what} has weights under other names than its architecture ({'; '.join(found)}): "
            "save it again with `save_pretrained` of the model itself, not of a wrapper around it"
        )
    if info["mismatched_keys"]:
        name, stored, wanted = sorted(info["mismatched_keys"])[0]
        raise ModelError(
            f"{what}: {name} has the shape {[*stored]} in the file, {[*wanted]} by config.json"
        )


def model_shape(model: PreTrainedModel) -> ModelShape:
    """The shape of a model, counted on its parameters; on `meta` too."""
    config: Any = model.config.get_text_config()
    network: Any = model
    masked, head = is_masked_model(model), network.get_output_embeddings()
    experts, active = _first(config, _EXPERTS), _first(config, _ACTIVE)
    active_share = active / experts if experts and active else 1.0
    if config.is_encoder_decoder or masked:
        modules = list(network.named_modules())
    else:  # without image encoders
        modules = [*network.get_decoder().named_modules(), ("", head)]
    matrices = 0.0
    for name, module in modules:
        if not isinstance(module, nn.Embedding):
            for parameter in module.parameters(recurse=False):
                if parameter.dim() >= 2:
                    stacked = parameter.dim() == 3 and parameter.shape[0] == experts
                    is_expert = stacked or ".experts." in f"{name}."
                    share = _PREDICTED if masked and module is head else 1
                    matrices += parameter.numel() * (active_share if is_expert else share)
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    layers = sum(kind in _ATTENTION for kind in kinds) if kinds else config.num_hidden_layers
    num_rows, width = network.get_input_embeddings().weight.shape
    return ModelShape(
        architecture=model.config.model_type,
        hidden_size=getattr(config, "hidden_size", width),
        vocab_size=num_rows,
        max_positions=_positions(config, modules),
        matmul_parameters=round(matrices),
        attention_width=layers * _attention_width(config),
        masked=masked,
    )


def _positions(config: Any, modules: list[tuple[str, nn.Module]]) -> int | None:
    """The longest sequence; RoBERTa's positions begin behind that of padding."""
    longest = getattr(config, "max_position_embeddings", None)
    for name, module in modules:
        padded = isinstance(module, nn.Embedding) and module.padding_idx is not None
        if longest is not None and padded and name.endswith("position_embeddings"):
            return longest - module.padding_idx - 1
    return longest


def _attention_width(config: Any) -> int:
    """Heads times head width of a layer, 0 without attention; the mean of keys' and values' widths
    where they differ (multi-head latent attention).
    """
    heads = getattr(config, "num_attention_heads", None) or 0
    if not heads:
        return 0
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys, values = (getattr(config, name, None) for name in ("qk_head_dim", "v_head_dim"))
    return heads * (keys + values) // 2 if keys and values else heads * width


def _first(config: Any, names: tuple[str, ...]) -> int | None:
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int)), None)
