from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from stillhouse.models.causal_lm import build_model
from stillhouse.models.head import PLAIN
from stillhouse.spec import ModelSettings
from stillhouse.training.objectives import ObjectiveFacts, chunked
from stillhouse.training.objectives import cross_entropy as objective
from stillhouse.training.objectives.cross_entropy import CrossEntropy

VOCAB, FACTS = 192, ObjectiveFacts(PLAIN)


def small(architecture: str = "llama", tie: bool = True) -> PreTrainedModel:
    settings = ModelSettings.model_validate(
        {"architecture": architecture, "hidden_size": 32, "num_layers": 1, "tie_embeddings": tie}
    )
    model = build_model(settings, vocab_size=VOCAB, sequence_length=16, seed=0, eos_id=0)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model


def gradients(model: PreTrainedModel) -> list[torch.Tensor]:
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return grads


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "olmo2", "gpt_neox"])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(("chunk_logits", "compiled"), [(1 << 22, False), (1, False), (1, True)])
def test_same_loss_and_gradients_as_all_logits_at_once(
    architecture: str,
    tie: bool,
    chunk_logits: int,
    compiled: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(chunked._CHUNK_LOGITS, "cpu", chunk_logits)
    if compiled:  # traced, as for a GPU, and run without the minutes of a C++ compiler
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
        objective._compiled_losses.cache_clear()
    model = small(architecture, tie)
    ids = torch.randint(0, VOCAB, (6, 16), generator=torch.Generator().manual_seed(0))
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    nll = cross_entropy(logits, ids[:, 1:].flatten())
    expected = nll + 0.01 * logits.logsumexp(-1).square().mean()
    expected.backward()
    reference = gradients(model)

    value = CrossEntropy(ObjectiveFacts(PLAIN, compiled=compiled), 0.01)(model, ids, {})
    (value.objective * 3).backward()
    torch.testing.assert_close(value.nll, nll)
    torch.testing.assert_close(value.objective, expected)
    for mine, theirs in zip(gradients(model), reference, strict=True):
        torch.testing.assert_close(mine, theirs * 3, rtol=1e-4, atol=1e-5)


def test_hopeless_tokens_have_finite_loss() -> None:
    model = small()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(100)
    ids = torch.randint(0, VOCAB, (2, 16), generator=torch.Generator().manual_seed(0))
    value = CrossEntropy(FACTS, 0.0)(model, ids, {})
    assert 100 < value.nll < float("inf")


def test_bfloat16_products_under_autocast() -> None:
    model, ids = small(), torch.arange(64).reshape(4, 16)
    exact = CrossEntropy(FACTS)(model, ids, {})
    exact.objective.backward()
    reference = gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        rough = CrossEntropy(FACTS)(model, ids, {})
    rough.objective.backward()
    assert rough.nll.dtype == torch.float32
    assert 0 < (rough.nll - exact.nll).abs() < 2e-2
    for mine, theirs in zip(gradients(model), reference, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - theirs).norm() < 0.05 * theirs.norm()


@pytest.mark.parametrize("chunk_logits", [1 << 22, 1])
def test_a_mask_leaves_out_tokens(chunk_logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Means, z-loss and gradients are those of the marked tokens alone."""
    monkeypatch.setitem(chunked._CHUNK_LOGITS, "cpu", chunk_logits)
    model = small()
    ids = torch.randint(0, VOCAB, (5, 16), generator=torch.Generator().manual_seed(0))
    mask = (torch.rand(5, 16, generator=torch.Generator().manual_seed(1)) < 0.3).float()
    kept = mask[:, 1:].flatten().bool()
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)[kept]
    nll = cross_entropy(logits, ids[:, 1:].flatten()[kept])
    expected = nll + 0.01 * logits.logsumexp(-1).square().mean()
    expected.backward()
    reference = gradients(model)
    value = CrossEntropy(FACTS, 0.01)(model, ids, {"loss_mask": mask})
    value.objective.backward()
    torch.testing.assert_close(value.nll, nll)
    torch.testing.assert_close(value.objective, expected)
    for mine, theirs in zip(gradients(model), reference, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    nothing = CrossEntropy(FACTS)(model, ids, {"loss_mask": torch.zeros(5, 16)})
    assert (nothing.objective.item(), nothing.nll.item()) == (0.0, 0.0)
