import json
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from stillhouse.cost import forward_flops, paper_cost

CASES = json.loads(
    (Path(__file__).parent / "vectors/color_filter_05_compute_cost.json").read_text()
)["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_the_papers_table_is_reproduced(case):
    inputs = case["inputs"]
    for method, expected in case["outputs"].items():
        cost = paper_cost(
            method,
            inputs["prior_tokens_b"],
            inputs["selected_tokens_b"],
            inputs["tau"],
            inputs["L"],
        )
        for item, value in expected.items():
            assert getattr(cost, item) == pytest.approx(value, abs=1e-9)


def test_flops_of_a_model_by_hand():
    sizes = {"hidden_size": 8, "num_layers": 2, "intermediate_size": 16, "vocab_size": 10}
    # a layer: q and o 64 each, k and v 32 each, MLP 3 * 128; attention 2 * 8 * 4 FLOPs
    flops = forward_flops(**sizes, sequence_length=4, num_heads=4, num_kv_heads=2)
    assert flops == 2 * (2 * (192 + 384) + 64) + 2 * 80
    plain = forward_flops(**sizes, sequence_length=4, num_heads=4, num_kv_heads=4, gated_mlp=False)
    assert plain == 2 * (2 * (256 + 256) + 64) + 2 * 80


def test_flops_are_twice_the_matrices_of_a_real_model():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 64}
    heads = {"num_key_value_heads": 2, "num_attention_heads": 4, "num_hidden_layers": 3}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True))
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    flops = forward_flops(**sizes, num_layers=3, sequence_length=16, num_heads=4, num_kv_heads=2)
    assert flops == 2 * matrices + 3 * 2 * 32 * 16
