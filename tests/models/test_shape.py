"""FLOPs of a token by hand: two for each weight that it meets, and causal attention."""

from typing import Any

import torch
from architectures import VOCAB, config_of
from transformers import AutoModelForCausalLM, PreTrainedConfig, Qwen3Config

from stillhouse.models.inspection import model_shape
from stillhouse.models.shape import ModelShape, planned_shape
from stillhouse.spec import ModelSettings


def shape_of(config: PreTrainedConfig) -> ModelShape:
    with torch.device("meta"):
        return model_shape(AutoModelForCausalLM.from_config(config))


def test_fresh_models() -> None:
    sizes: dict[str, Any] = {"hidden_size": 8, "num_layers": 2, "intermediate_size": 16}
    llama = planned_shape(ModelSettings(**sizes, num_heads=2), 10, 4)
    # a layer: q, k, v and o of 64 each, MLP of 3 * 8 * 16; attention of 4 * 8 * (4 / 2) FLOPs
    assert llama.flops_per_token(4) == 2 * (2 * (256 + 384) + 64) + 2 * (64 * 8)
    neox = planned_shape(ModelSettings(architecture="gpt_neox", **sizes, num_heads=2), 10, 4)
    assert neox.flops_per_token(4) == 2 * (2 * (256 + 256) + 64) + 2 * (64 * 8)


def test_heads_of_their_own_width() -> None:
    """Qwen3-0.6B: 16 heads of 128 on a width of 1,024."""
    config = Qwen3Config(
        vocab_size=151_936,
        hidden_size=1024,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=3072,
        tie_word_embeddings=True,
    )
    q_and_o, k_and_v = 2 * 1024 * (16 * 128), 2 * 1024 * (8 * 128)
    layer = 2 * (q_and_o + k_and_v + 3 * 1024 * 3072) + 4 * (16 * 128) * (512 // 2)
    by_hand = 28 * layer + 2 * 1024 * 151_936
    assert round(by_hand / 1e9, 2) == 1.25
    assert shape_of(config).flops_per_token(512) == by_hand


def test_only_active_experts_count() -> None:
    """Qwen3-MoE, 2 of 8 experts; Mixtral, 2 of 8 by default. The router sees every token."""
    attention = 2 * (32 * 32) + 2 * (32 * 16)
    for name, width in (("qwen3_moe", 16), ("mixtral", 64)):
        layer = attention + 8 * 32 + 2 * (3 * 32 * width)
        expected = 2 * (2 * layer + 32 * VOCAB) + 2 * (4 * 32 * 10)
        assert shape_of(config_of(name)).flops_per_token(20) == expected, name


def test_sizes_under_other_names() -> None:
    """GPT-2's `n_embd`, Gemma 3's nested sizes, and Mamba without attention or positions."""
    gpt2 = shape_of(config_of("gpt2"))
    assert (gpt2.vocab_size, gpt2.max_positions, gpt2.attention_width) == (VOCAB, 64, 2 * 32)
    assert gpt2.matmul_parameters == 2 * (4 * 32 * 32 + 8 * 32 * 32) + 32 * VOCAB
    gemma = shape_of(config_of("gemma3"))
    text = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64) + 32 * VOCAB
    assert (gemma.architecture, gemma.max_positions) == ("gemma3", 64)
    assert gemma.matmul_parameters == text, "image encoders see no text"
    mamba = shape_of(config_of("mamba"))
    assert (mamba.max_positions, mamba.attention_width) == (None, 0)
    assert shape_of(config_of("bloom")).max_positions is None
