"""Causal language models: made from settings, loaded and saved as transformers folders."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    Olmo2Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from stillhouse.errors import ModelError
from stillhouse.models.cpu import Attention, set_attention
from stillhouse.models.device import choose_device as choose_device
from stillhouse.models.seeded import initialised
from stillhouse.models.shape import model_uri
from stillhouse.spec import Dtype, ModelSettings
from stillhouse.storage.folders import local_folder

_VOCAB_MULTIPLE = 64  # tensor cores and vector units want whole tiles
_CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "qwen3": Qwen3Config,
    "olmo2": Olmo2Config,
    "gpt_neox": GPTNeoXConfig,
}


def choose_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """The forward pass's dtype; `auto` is bfloat16 on GPUs and float32 (exact) on CPUs."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if dtype == "bfloat16" else torch.float32


def model_config(
    settings: ModelSettings, *, vocab_size: int, sequence_length: int, eos_id: int
) -> PreTrainedConfig:
    """The transformers configuration. The vocabulary is rounded up to a multiple of 64.

    Raises:
        ModelError: the width is no multiple of twice the number of heads (rotary positions turn
            pairs), or the context is shorter than the sequences.
    """
    width = settings.hidden_size
    heads = settings.num_heads or max(1, width // (64 if width >= 256 else 32))
    if width % (2 * heads):
        raise ModelError(
            f"`model.hidden_size` {width} does not divide into {heads} heads of an even width: "
            "change `model.num_heads` or `model.hidden_size`"
        )
    positions = settings.max_position or sequence_length
    if positions < sequence_length:
        raise ModelError(
            f"`model.max_position` {positions} is below `sequence_length` {sequence_length}"
        )
    sizes: dict[str, Any] = {
        "vocab_size": _round_up(vocab_size, _VOCAB_MULTIPLE),
        "hidden_size": width,
        "num_hidden_layers": settings.num_layers,
        "num_attention_heads": heads,
        "intermediate_size": settings.intermediate_size or _round_up(round(width * 8 / 3), 64),
        "max_position_embeddings": positions,
        "tie_word_embeddings": settings.tie_embeddings,
        "eos_token_id": eos_id,
        "bos_token_id": None,
        "pad_token_id": None,
    }
    if settings.architecture != "gpt_neox":
        sizes |= {"num_key_value_heads": heads, "head_dim": width // heads}
    return _CONFIGS[settings.architecture](**sizes)


def build_model(
    settings: ModelSettings, *, vocab_size: int, sequence_length: int, seed: int, eos_id: int
) -> PreTrainedModel:
    """A fresh float32 model on the CPU; its weights depend on the settings and the seed alone.

    Raises:
        ModelError: as `model_config`.
    """
    config = model_config(
        settings, vocab_size=vocab_size, sequence_length=sequence_length, eos_id=eos_id
    )
    return initialised(lambda: AutoModelForCausalLM.from_config(config, dtype=torch.float32), seed)


def load_model(
    path: str, *, dtype: Dtype, attention: Attention, device: torch.device
) -> PreTrainedModel:
    """A model from a folder, an fsspec URI or the hub: safetensors only, no code from there.

    Raises:
        ModelError: nothing there, or not a causal language model in safetensors.
    """
    with local_folder(model_uri(path), (".json", ".safetensors")) as folder:
        try:
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=choose_dtype(dtype, device),
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
            )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            reason = " ".join(str(error).replace(str(folder), path).split())[:300]
            raise ModelError(f"cannot load the model {path!r}: {reason}") from error
    set_attention(model, attention, device)
    return model.to(device)  # pyright: ignore[reportArgumentType]


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Write config.json and safetensors; the same weights give the same bytes."""
    model.save_pretrained(folder)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
