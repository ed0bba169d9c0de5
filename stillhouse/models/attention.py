"""Which attention kernel a model uses on sequences without padding.

transformers hands SDPA a dense mask [B, 1, T, T] wherever a model is compiled, and SDPA's fastest
kernels take none. `causal_sdpa` is the same function under a name for which no mask is made:
causality is a flag then, on every device.
"""

from typing import Any, Literal

from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from stillhouse.errors import ModelError

Attention = Literal["auto", "sdpa", "eager", "flash_attention_2"]

CAUSAL_SDPA = "causal_sdpa"
_SDPA_FROM = 256
"""Positions from which SDPA is quicker on CPUs (docs/measurements.md)."""

AttentionInterface.register(CAUSAL_SDPA, sdpa_attention_forward)


def set_attention(model: PreTrainedModel, attention: Attention, length: int) -> None:
    """Set the kernel for sequences of `length` tokens that are not padded.

    `auto` is SDPA, and eager where the architecture has no other or on the CPU below 256 tokens.

    Raises:
        ModelError: the architecture has no such kernel, or its package is not installed.
    """
    name = _kernel(model, attention, length)
    if model.config._attn_implementation == name:  # pyright: ignore[reportPrivateUsage]
        return
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        raise ModelError(
            f"`attention: {attention}` does not go with the architecture "
            f"{model.config.model_type!r}: {' '.join(str(error).split())[:200]}"
        ) from error


def _kernel(model: PreTrainedModel, attention: Attention, length: int) -> str:
    traits: Any = model
    if attention == "auto":
        short = model.device.type == "cpu" and length < _SDPA_FROM
        attention = "eager" if short or not traits._supports_sdpa else "sdpa"
    if attention == "sdpa" and traits._supports_attention_backend and _sees_all(model, length):
        return CAUSAL_SDPA
    return attention


def _sees_all(model: PreTrainedModel, length: int) -> bool:
    """Whether every position sees all positions before it: nothing to mask but the future."""
    config: Any = model.config.get_text_config()
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return all(window is None or window >= length for window in windows)
