"""Sub-networks are slices of their super-network, and models of their own once extracted."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from stillhouse.errors import SpecError
from stillhouse.models.causal_lm import save_model, set_attention
from stillhouse.models.inspection import model_shape
from stillhouse.models.sub_networks import (
    SubModel,
    SubNetwork,
    extract,
    own_size,
    shape_of,
    sub_config,
)

VOCAB, LENGTH = 50, 9
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 60,
    "max_position_embeddings": 16,
    "tie_word_embeddings": True,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "untied": LlamaConfig(**SIZES | {"tie_word_embeddings": False, "num_key_value_heads": 4}),
}
SMALL = SubNetwork(2, 2, 16, 1.5)


@pytest.fixture(params=[*CONFIGS])
def model(request):
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(CONFIGS[request.param], dtype=torch.float32)
    with torch.no_grad():
        for parameter in made.parameters():  # norms too
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return made.train()


def tokens():
    return torch.randint(0, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_largest_is_the_model_bit_for_bit(model, attention):
    set_attention(model, attention, LENGTH)
    whole = SubModel(model.config, own_size(model.config))
    found = whole.states(model, tokens())
    known = model.base_model(input_ids=tokens(), use_cache=False).last_hidden_state
    assert torch.equal(found, known)
    pairs = zip(
        torch.autograd.grad(found.square().sum(), [*model.base_model.parameters()]),
        torch.autograd.grad(known.square().sum(), [*model.base_model.parameters()]),
        strict=True,
    )
    assert all(torch.equal(one, other) for one, other in pairs)


def test_gradients_outside_the_slices_are_zero(model):
    SubModel(model.config, SMALL).states(model, tokens()).square().sum().backward()
    sizes = {
        "embed_tokens.weight": (VOCAB, 16),
        "layers.1.input_layernorm.weight": (16,),
        "layers.1.self_attn.q_proj.weight": (16, 16),
        "layers.1.self_attn.o_proj.weight": (16, 16),
        "layers.1.mlp.gate_proj.weight": (24, 16),
        "layers.1.mlp.down_proj.weight": (16, 24),
        "norm.weight": (16,),
    }
    for name, size in sizes.items():
        gradient = model.base_model.get_parameter(name).grad
        inside = gradient[tuple(slice(n) for n in size)]
        assert gradient.count_nonzero() == inside.count_nonzero() > 0, name
    last = [p.grad for n, p in model.named_parameters() if n.startswith("model.layers.2.")]
    assert last and all(gradient is None for gradient in last)


def test_an_extracted_one_is_a_plain_model_of_the_same_states(model, tmp_path):
    set_attention(model, "eager", LENGTH)
    small = extract(model, SMALL)
    save_model(small, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert loaded.config.head_dim == 8
    states = SubModel(model.config, SMALL).states(model, tokens())
    torch.testing.assert_close(loaded.base_model(input_ids=tokens()).last_hidden_state, states)
    head = model.get_output_embeddings().weight[:, :16]
    torch.testing.assert_close(loaded(input_ids=tokens()).logits, states @ head.T)
    assert model_shape(loaded) == shape_of(model.config, SMALL)


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        (SubNetwork(4, 4, 24, 2.5), "larger than the super-network"),
        (SubNetwork(3, 4, 32, 1.0), "larger than the super-network"),
        (SubNetwork(3, 4, 24, 3.0), "larger than the super-network"),
        (SubNetwork(3, 3, 24, 2.5), "use a multiple of 2"),
    ],
)
def test_what_does_not_fit_is_refused(size, wanted):
    with pytest.raises(SpecError, match=wanted):
        sub_config(CONFIGS["llama"], size)
