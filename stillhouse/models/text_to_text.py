"""Models that mixing trains: encoder-decoders (T5) and decoders, fresh or from a folder."""

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel, T5Config

from stillhouse.errors import ModelError
from stillhouse.models.causal_lm import build_model, choose_dtype, load_model, load_weights
from stillhouse.models.device import initialised
from stillhouse.models.shape import default_heads, default_mlp, round_up
from stillhouse.spec import Dtype, ModelSettings


def build_text_model(
    settings: ModelSettings,
    *,
    encoder_decoder: bool,
    vocab_size: int,
    num_positions: int,
    seed: int,
    eos_id: int,
    pad_id: int,
) -> PreTrainedModel:
    """A fresh float32 model on the CPU; its weights depend on the settings and the seed alone.

    An encoder-decoder is T5 1.1: gated GELU, `num_layers` on both sides, no dropout, and a separate
    output head unless `tie_embeddings`.

    Raises:
        ModelError: the sizes do not fit each other.
    """
    if not encoder_decoder:
        return build_model(
            settings,
            vocab_size=vocab_size,
            sequence_length=num_positions,
            seed=seed,
            eos_id=eos_id,
        )
    width, heads = settings.hidden_size, default_heads(settings)
    if width % heads:
        raise ModelError(
            f"`model.hidden_size` {width} does not divide into {heads} heads: change "
            "`model.num_heads` or `model.hidden_size`"
        )
    sizes: dict[str, Any] = {
        "vocab_size": round_up(vocab_size),
        "d_model": width,
        "d_kv": width // heads,
        "d_ff": default_mlp(settings),
        "num_layers": settings.num_layers,
        "num_heads": heads,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
        "decoder_start_token_id": pad_id,
        "tie_word_embeddings": settings.tie_embeddings,
    }
    return initialised(lambda: _t5(T5Config(**sizes), settings.tie_embeddings), seed)


def _t5(config: T5Config, tied: bool) -> PreTrainedModel:
    model = AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32)
    if not tied:  # transformers ties T5's head whatever the configuration says
        network: Any = model
        network.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        nn.init.normal_(network.lm_head.weight, std=config.d_model**-0.5)
    return model


def load_text_model(
    path: str, *, encoder_decoder: bool, device: torch.device, dtype: Dtype = "float32"
) -> PreTrainedModel:
    """A model from a folder, an fsspec URI or the hub: safetensors only.

    Raises:
        ModelError: as `load_weights`.
    """
    if not encoder_decoder:
        return load_model(path, dtype=dtype, device=device)
    model = load_weights(AutoModelForSeq2SeqLM, path, choose_dtype(dtype, device))
    return model.to(device)  # pyright: ignore[reportArgumentType]
