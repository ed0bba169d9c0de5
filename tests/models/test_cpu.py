import pytest
import torch

from stillhouse.models.causal_lm import build_model
from stillhouse.models.cpu import set_attention, use_onednn_for_float32
from stillhouse.spec import ModelSettings


def test_float32_products_stay_exact() -> None:
    use_onednn_for_float32()
    left = torch.randn(300, 400, generator=torch.Generator().manual_seed(1))
    assert (left @ left.T - left.double() @ left.double().T).abs().max() < 1e-3


@pytest.mark.parametrize(("positions", "expected"), [(2048, "eager"), (4096, "sdpa")])
def test_automatic_attention_on_the_cpu(positions: int, expected: str) -> None:
    model = build_model(
        ModelSettings(hidden_size=64), vocab_size=64, sequence_length=8, seed=0, eos_id=0
    )
    model.config.max_position_embeddings = positions
    set_attention(model, "auto", torch.device("cpu"))
    assert model.config._attn_implementation == expected
    set_attention(model, "eager", torch.device("cpu"))
    assert model.config._attn_implementation == "eager"
