"""Which attention runs: by the sequences' length, without a mask where there is nothing to mask."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn.functional import scaled_dot_product_attention
from trainings import Sequences
from transformers import AutoModelForCausalLM, BloomConfig, Gemma2Config, Gemma3TextConfig

from stillhouse.errors import ModelError
from stillhouse.models.attention import set_attention
from stillhouse.models.causal_lm import build_model
from stillhouse.models.scoring import ScoringModel
from stillhouse.spec import ModelSettings, Optimisation
from stillhouse.training.loop import Trainer

ARCHITECTURES = ["llama", "qwen3", "olmo2", "gpt_neox"]
VOCAB, LONG = 320, 272
SEEN = [0, 1, 63, 120, 200, 255, 270]


def small(architecture: str = "llama", length: int = LONG) -> Any:
    settings = ModelSettings.model_validate(
        {"architecture": architecture, "hidden_size": 64, "num_layers": 2}
    )
    model = build_model(settings, vocab_size=VOCAB, sequence_length=length, seed=0, eos_id=0)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(10)
    return model


def tokens(num_rows: int, length: int = LONG) -> NDArray[Any]:
    return np.random.default_rng(0).integers(0, VOCAB, (num_rows, length)).astype(np.uint16)


def losses_in_float64(model: Any, input_ids: NDArray[Any]) -> NDArray[np.float64]:
    """At some positions, each by a forward pass of the tokens up to it alone."""
    found: list[list[float]] = []
    model.double()
    for row in torch.from_numpy(input_ids.astype(np.int64)):
        found.append([])
        for t in SEEN:
            with torch.inference_mode():
                logits = model(input_ids=row[None, : t + 1]).logits[0, -1].double()
                found[-1].append(float(logits.exp().sum().log() - logits[row[t + 1]]))
    model.float()
    return np.array(found)


@pytest.fixture
def asked_of_sdpa(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What compiled graphs ask of SDPA: they are compiled as ever, but run as they were traced."""
    asked: list[dict[str, Any]] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        asked.extend(
            dict(node.kwargs)
            for node in graph.graph.nodes
            if node.target is scaled_dot_product_attention
        )
        return graph.forward

    compile_function = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **kw: compile_function(function, backend=backend, **kw)
    )
    torch._dynamo.reset()
    return asked


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiled_scoring_gives_sdpa_no_mask(
    architecture: str, asked_of_sdpa: list[dict[str, Any]]
) -> None:
    model, ids = small(architecture), tokens(3)
    expected = losses_in_float64(model, ids)
    scorer = ScoringModel(model, dtype=torch.float32, micro_batch=2, compile=True, attention="sdpa")
    np.testing.assert_allclose(scorer.token_nll(ids)[:, SEEN], expected, atol=2e-5)
    assert asked_of_sdpa
    assert all(ask["attn_mask"] is None and ask["is_causal"] is True for ask in asked_of_sdpa)


def test_compiled_training_gives_sdpa_no_mask(asked_of_sdpa: list[dict[str, Any]]) -> None:
    settings = Optimisation(global_batch=2, compile="on", learning_rate=1e-3)
    source = Sequences(tokens(2), batch_size=2)
    model = small()
    expected = losses_in_float64(model, tokens(2))
    trainer = Trainer(model, source, settings, device=torch.device("cpu"), num_steps=1)
    np.testing.assert_allclose(trainer.token_nll(tokens(2))[:, SEEN], expected, atol=2e-5)
    trainer.step()
    assert asked_of_sdpa
    assert all(ask["attn_mask"] is None and ask["is_causal"] is True for ask in asked_of_sdpa)


@pytest.mark.parametrize(("length", "expected"), [(255, "eager"), (256, "causal_sdpa")])
def test_automatic_attention_on_the_cpu_goes_by_the_sequences(length: int, expected: str) -> None:
    model = small(length=4096)
    ScoringModel(model, dtype=torch.float32).token_nll(tokens(1, length))
    assert model.config._attn_implementation == expected


def test_an_explicit_choice_stays() -> None:
    model = small()
    set_attention(model, "eager", 512)
    assert model.config._attn_implementation == "eager"
    with pytest.raises(
        ModelError, match=r"`attention: flash_attention_2` does not go with .*llama"
    ):
        set_attention(model, "flash_attention_2", 512)


def tiny(config: type[Any], **sizes: Any) -> Any:
    common = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": None}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(**common | sizes)).eval()


def test_a_sliding_window_is_still_masked() -> None:
    """Six layers, of which five see 100 tokens: without a mask they would see all 272."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    sizes = {"intermediate_size": 32, "num_hidden_layers": 6, "sliding_window": 100}
    model = tiny(Gemma3TextConfig, initializer_range=0.5, **heads, **sizes)
    model.set_attn_implementation("eager")
    expected = losses_in_float64(model, tokens(2))
    set_attention(model, "auto", LONG)
    assert model.config._attn_implementation == "sdpa"
    found = ScoringModel(model, dtype=torch.float32).token_nll(tokens(2))
    np.testing.assert_allclose(found[:, SEEN], expected, atol=1e-3)
    set_attention(model, "sdpa", 100)
    assert model.config._attn_implementation == "causal_sdpa"


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (BloomConfig, {"n_head": 2}),  # attends in its own code
        (Gemma2Config, {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}),
    ],
)
def test_architectures_without_sdpa_stay_eager(config: type[Any], sizes: dict[str, Any]) -> None:
    model = tiny(config, **sizes)
    set_attention(model, "auto", LONG)
    assert model.config._attn_implementation == "eager"
