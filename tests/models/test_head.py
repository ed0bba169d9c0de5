from typing import Any

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, VOCAB, config_of, own_nll, tiny
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, GPT2LMHeadModel

from stillhouse.errors import ModelError
from stillhouse.models.head import PLAIN, LogitRule, logit_rule
from stillhouse.models.scoring import ScoringModel
from stillhouse.training.objectives import ObjectiveFacts
from stillhouse.training.objectives.cross_entropy import CrossEntropy

IDS = np.random.default_rng(0).integers(0, VOCAB, (5, 24)).astype(np.uint16)
RULES = {
    "gemma2": LogitRule(soft_cap=2.0),
    "nanochat": LogitRule(soft_cap=3.0),
    "recurrent_gemma": LogitRule(soft_cap=2.0),
    "cohere": LogitRule(scale=0.25),
    "granite": LogitRule(scale=0.25),
    "granitemoe": LogitRule(scale=0.25),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_losses_are_those_of_the_models_own_logits(architecture: str) -> None:
    """Without and with BOS; the rule is found without weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(architecture))
    assert logit_rule(model) == RULES.get(architecture, PLAIN)
    model = tiny(architecture)
    for bos in (None, 7):
        expected = own_nll(model, IDS, before=bos)
        scorer = ScoringModel(model, dtype=torch.float32, micro_batch=2, bos_id=bos)
        np.testing.assert_allclose(scorer.token_nll(IDS), expected, rtol=1e-4, atol=1e-4)
        assert expected.std() > 0.1, "losses of a constant model show nothing"


@pytest.mark.parametrize("bos", [None, 7])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("architecture", ["gemma2", "cohere", "granite", "phi", "opt"])
def test_gradients_are_those_of_autograd_through_the_own_logits(
    architecture: str, compiled: bool, bos: int | None
) -> None:
    model, ids = tiny(architecture), torch.from_numpy(IDS.astype(np.int64))
    given = ids if bos is None else torch.cat([torch.full((len(ids), 1), bos), ids], 1)
    logits = model(input_ids=given, use_cache=False).logits[:, -ids.shape[1] : -1]
    z = logits.logsumexp(-1)
    nll = z - logits.gather(-1, ids[:, 1:, None])[..., 0]
    (nll.mean() + 0.01 * z.square().mean()).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    value = CrossEntropy(ObjectiveFacts(logit_rule(model), bos, compiled), 0.01)(model, ids, {})
    value.objective.backward()
    torch.testing.assert_close(value.nll, nll.mean(), rtol=1e-5, atol=1e-5)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)


def test_a_soft_cap_is_found_where_logits_are_small() -> None:
    model = tiny("gemma2")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e-4)
    assert logit_rule(model) == LogitRule(soft_cap=2.0)


class Odd(GPT2LMHeadModel):
    """Changes its logits in a way that no configuration describes."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.sign() * output.logits.abs().sqrt()
        return output


@pytest.mark.parametrize("model", [Odd(config_of("gpt2")), None], ids=["gpt2", "bert"])
def test_unknown_heads_are_refused_by_name(model: Any) -> None:
    if model is None:
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = BertConfig(**sizes, intermediate_size=32, vocab_size=64, is_decoder=True)
        model = AutoModelForCausalLM.from_config(config)
    before = dict(model.named_modules())
    with pytest.raises(ModelError, match=model.config.model_type):
        ScoringModel(model, dtype=torch.float32)
    assert dict(model.named_modules()) == before, "the model was changed"


def test_the_model_is_unchanged() -> None:
    model = tiny("opt")
    head, body = model.get_output_embeddings(), vars(model.base_model).copy()
    logit_rule(model)
    assert model.get_output_embeddings() is head and isinstance(head, nn.Linear)
    assert vars(model.base_model).keys() == body.keys()
