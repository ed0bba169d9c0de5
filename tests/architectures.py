"""Tiny models of many architectures. Their weights are random, and large: losses differ by token.

Nothing here uses our code: losses are taken from the architecture's own logits.
"""

from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCAB = 128
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
_TWO = {"num_key_value_heads": 2}
_SHORT = {"n_embd": 32, "n_layer": 2, "n_head": 4}
_VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 16,
    "patch_size": 8,
}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _SIZES | _TWO),
    "qwen3": ("Qwen3", _SIZES | _TWO | {"head_dim": 32}),
    "qwen3_moe": ("Qwen3Moe", _SIZES | _TWO | _EXPERTS | {"head_dim": 8}),
    "mixtral": ("Mixtral", _SIZES | _TWO),
    "olmo2": ("Olmo2", _SIZES),
    "gpt_neox": ("GPTNeoX", _SIZES),
    "gpt2": ("GPT2", _SHORT | {"n_positions": 64}),
    "gpt_neo": (
        "GPTNeo",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "max_position_embeddings": 64,
            "window_size": 8,
            "attention_types": [[["global", "local"], 1]],
        },
    ),
    "gptj": ("GPTJ", _SHORT | {"n_positions": 64, "rotary_dim": 4}),  # a head with a bias
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mpt": ("Mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "opt": ("OPT", _SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 16}),  # a projection before it
    "phi": ("Phi", _SIZES),  # a head with a bias
    "falcon": ("Falcon", _SIZES),
    "mamba": ("Mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "gemma": ("Gemma", _SIZES | _TWO | {"head_dim": 8}),
    "gemma2": ("Gemma2", _SIZES | _TWO | {"head_dim": 8, "final_logit_softcapping": 2.0}),
    "gemma3_text": ("Gemma3Text", _SIZES | _TWO | {"head_dim": 8, "sliding_window": 8}),
    "gemma3": (
        "Gemma3",
        {
            "text_config": _SIZES | _TWO | {"head_dim": 8, "vocab_size": VOCAB},
            "vision_config": _VISION,
            "mm_tokens_per_image": 4,
        },
    ),
    "cohere": ("Cohere", _SIZES | _TWO | {"logit_scale": 0.25}),
    "granite": ("Granite", _SIZES | _TWO | {"logits_scaling": 4.0}),
    "granitemoe": ("GraniteMoe", _SIZES | _TWO | {"logits_scaling": 4.0}),
    "nanochat": ("NanoChat", _SIZES | {"final_logit_softcapping": 3.0}),
    "recurrent_gemma": (
        "RecurrentGemma",
        _SIZES | {"logits_soft_cap": 2.0, "lru_width": 32, "num_hidden_layers": 3},
    ),
}
ARCHITECTURES = tuple(_CONFIGS)


def config_of(architecture: str, vocab_size: int = VOCAB) -> PreTrainedConfig:
    """A configuration of about 50,000 weights."""
    name, sizes = _CONFIGS[architecture]
    vocab = {} if architecture == "gemma3" else {"vocab_size": vocab_size}
    return getattr(transformers, f"{name}Config")(**sizes, **vocab, **_TOKENS)


def tiny(architecture: str, seed: int = 0, vocab_size: int = VOCAB) -> PreTrainedModel:
    """A float32 model in evaluation mode."""
    torch.manual_seed(seed)
    model: Any = (
        AutoModelForCausalLM.from_config(config_of(architecture, vocab_size)).float().eval()
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
        head = model.get_output_embeddings()
        if head.bias is not None:
            head.bias.normal_()
    return model


def own_nll(model: PreTrainedModel, ids: NDArray[Any], before: int | None = None) -> NDArray[Any]:
    """[N, T] -> float64 [N, T-1]: by the architecture's own logits; `before` stands first."""
    rows = torch.from_numpy(ids.astype(np.int64))
    given = rows
    if before is not None:
        given = torch.cat([torch.full((len(rows), 1), before), rows], 1)
    with torch.no_grad():
        logits = model(input_ids=given, use_cache=False).logits.double()[:, -ids.shape[1] : -1]
    probabilities = torch.softmax(logits, -1).gather(-1, rows[:, 1:, None])[..., 0]
    return (-probabilities.log()).numpy()
