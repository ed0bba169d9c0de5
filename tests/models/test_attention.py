"""The attention kernel: chosen by sequence length, without a mask where causality is enough."""

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
from stillhouse.models.causal_lm import build_model, set_attention
from stillhouse.models.scoring import ScoringModel
from stillhouse.spec import ModelSettings, Optimisation
from stillhouse.training.loop import Trainer

VOCAB, LONG = 320, 272
POSITIONS = [0, 1, 63, 120, 200, 255, 270]
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}


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
    """At some positions, each by a forward pass over the tokens up to it only."""
    losses: list[list[float]] = []
    model.double()
    for row in torch.from_numpy(input_ids.astype(np.int64)):
        losses.append([])
        for t in POSITIONS:
            with torch.inference_mode():
                logits = model(input_ids=row[None, : t + 1]).logits[0, -1].double()
                losses[-1].append(float(logits.exp().sum().log() - logits[row[t + 1]]))
    model.float()
    return np.array(losses)


@pytest.fixture
def sdpa_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Arguments of SDPA in compiled graphs, which are traced as usual and then run uncompiled."""
    calls: list[dict[str, Any]] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        calls.extend(
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
    return calls


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "olmo2", "gpt_neox", "training"])
def test_compiled_models_give_sdpa_no_mask(
    architecture: str, sdpa_calls: list[dict[str, Any]]
) -> None:
    ids = tokens(3)
    if architecture == "training":
        settings = Optimisation(global_batch=3, compile="on", learning_rate=1e-3)
        model, source = small(), Sequences(ids, batch_size=3)
        expected = losses_in_float64(model, ids)
        trainer = Trainer(model, source, settings, device=torch.device("cpu"), num_steps=1)
        found = trainer.token_nll(ids)
        trainer.step()
    else:
        model = small(architecture)
        expected = losses_in_float64(model, ids)
        options: dict[str, Any] = {"micro_batch": 2, "compile": True, "attention": "sdpa"}
        found = ScoringModel(model, dtype=torch.float32, **options).token_nll(ids)
    np.testing.assert_allclose(found[:, POSITIONS], expected, atol=2e-5)
    assert sdpa_calls
    assert all(call["attn_mask"] is None and call["is_causal"] is True for call in sdpa_calls)


@pytest.mark.parametrize(("length", "expected"), [(255, "eager"), (256, "causal_sdpa")])
def test_automatic_attention_on_the_cpu_goes_by_length(length: int, expected: str) -> None:
    model = small(length=4096)
    ScoringModel(model, dtype=torch.float32).token_nll(tokens(1, length))
    assert model.config._attn_implementation == expected


def test_an_explicit_choice_is_kept() -> None:
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
    """Six layers, of which five attend to 100 tokens: without a mask they would to all 272."""
    sizes = {"intermediate_size": 32, "num_hidden_layers": 6, "sliding_window": 100}
    model = tiny(Gemma3TextConfig, initializer_range=0.5, **HEADS, **sizes)
    model.set_attn_implementation("eager")
    expected = losses_in_float64(model, tokens(2))
    set_attention(model, "auto", LONG)
    assert model.config._attn_implementation == "sdpa"
    found = ScoringModel(model, dtype=torch.float32).token_nll(tokens(2))
    np.testing.assert_allclose(found[:, POSITIONS], expected, atol=1e-3)
    set_attention(model, "sdpa", 100)
    assert model.config._attn_implementation == "causal_sdpa"


@pytest.mark.parametrize(("config", "sizes"), [(BloomConfig, {"n_head": 2}), (Gemma2Config, HEADS)])
def test_architectures_without_sdpa_stay_eager(config: type[Any], sizes: dict[str, Any]) -> None:
    model = tiny(config, **sizes)
    set_attention(model, "auto", LONG)
    assert model.config._attn_implementation == "eager"
