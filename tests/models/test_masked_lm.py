"""Masked language models: what they are told by, their sizes, and what is loaded of them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from masked_parts import CONFIGS, tiny_masked
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForPreTraining, BertLMHeadModel
from transformers.models.auto import modeling_auto as auto

from stillhouse.errors import ModelError
from stillhouse.models.causal_lm import load_model, set_attention
from stillhouse.models.inspection import inspect_model, model_shape
from stillhouse.models.masked_lm import last_states, masked_logits
from stillhouse.models.shape import MASKED_ONLY, is_masked, read_header

CPU = torch.device("cpu")
VOCAB = 96


def bert(kind, folder, **changes):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 64, "vocab_size": VOCAB, "max_position_embeddings": 40}
    kind(BertConfig(**sizes)).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return read_header(str(folder), "model")


def test_what_a_masked_model_is_told_by():
    """BERT exists as both; those that exist as masked ones only are transformers' own."""
    assert is_masked({"model_type": "bert", "architectures": ["BertForMaskedLM"]})
    assert not is_masked({"model_type": "bert", "architectures": ["BertLMHeadModel"]})
    assert is_masked({"model_type": "distilbert"})
    assert not is_masked({"model_type": "llama", "architectures": None})
    masked, causal = auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    assert masked.keys() - causal.keys() >= MASKED_ONLY


@pytest.mark.parametrize("architecture", [*CONFIGS])
def test_logits_of_some_positions_are_the_models_own(architecture, tmp_path):
    tiny_masked(architecture, vocab_size=VOCAB).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), dtype="float32", device=CPU).eval()
    ids = torch.randint(5, VOCAB, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        set_attention(model, "sdpa", 20)
        states = last_states(model, ids)
        found = masked_logits(model, states[:, ::3].flatten(0, 1))
    torch.testing.assert_close(found, wanted[:, ::3].flatten(0, 1), rtol=1e-4, atol=1e-4)
    made = inspect_model(read_header(str(tmp_path), "model"))
    assert made == model_shape(model) and made.masked and made.hidden_size == 32
    # RoBERTa's positions begin behind that of padding, which is 1
    assert made.max_positions == (62 if architecture == "roberta" else 64)


def test_what_a_token_costs():
    """A layer: 4 H^2 and two of the MLP; the transform before the head; 15 % of the head."""
    made = model_shape(tiny_masked("bert", vocab_size=100))
    assert made.matmul_parameters == 2 * (4 * 32**2 + 2 * 32 * 64) + 32**2 + 480
    causal = replace(made, masked=False)
    assert made.flops_per_token(10) - causal.flops_per_token(10) == 2 * 10 * 2 * 32


def test_other_heads_and_old_names_do_not_matter(tmp_path):
    """As BERT itself is stored: a pooler, a second head, names of its first release."""
    bert(BertForPreTraining, tmp_path, architectures=["BertForMaskedLM"])
    stored = load_file(tmp_path / "model.safetensors")
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("Norm.bias", "Norm.beta"): one
        for name, one in stored.items()
    }
    renamed["bert.embeddings.LayerNorm.gamma"] = torch.full((32,), 3.0)
    save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    assert inspect_model(read_header(str(tmp_path), "model")).masked
    model = load_model(str(tmp_path), dtype="float32", device=CPU)
    assert "pooler" not in "".join(model.state_dict())
    assert (model.base_model.embeddings.LayerNorm.weight == 3).all()


def test_weights_that_are_missing_are_not_made_up(tmp_path):
    header = bert(BertForPreTraining, tmp_path, architectures=["BertForMaskedLM"])
    shapes = {n: s for n, s in header.shapes.items() if "predictions.transform" not in n}
    with pytest.raises(ModelError, match="not in the file: cls"):
        inspect_model(replace(header, shapes=shapes))


def test_a_causal_bert_is_not_masked(tmp_path):
    """Its head is not one that scoring knows, which is said as ever."""
    header = bert(BertLMHeadModel, tmp_path, is_decoder=True)
    header.check_causal()
    with pytest.raises(ModelError, match="makes its logits in a way"):
        inspect_model(header)


def test_a_broken_configuration_is_left_to_others(tmp_path):
    header = bert(BertForPreTraining, tmp_path)
    assert not replace(header, config=b"[").masked and not replace(header, config=b"[]").masked
    Path(tmp_path, "config.json").unlink()
    with pytest.raises(ModelError, match="cannot load the model"):
        load_model(str(tmp_path), dtype="float32", device=CPU)
