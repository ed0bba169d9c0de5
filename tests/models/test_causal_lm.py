import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

from stillhouse.errors import ModelError
from stillhouse.models.causal_lm import build_model, load_model, save_model
from stillhouse.models.inspection import inspect_model, model_shape
from stillhouse.models.shape import ModelHeader, planned_shape, read_header
from stillhouse.models.text_to_text import load_text_model
from stillhouse.spec import ModelSettings

CPU = torch.device("cpu")
ARCHITECTURES = ["llama", "qwen3", "olmo2", "gpt_neox"]


def small(architecture: str = "llama", seed: int = 0, **changes: object) -> PreTrainedModel:
    settings = ModelSettings.model_validate(
        {"architecture": architecture, "hidden_size": 64, "num_layers": 1, **changes}
    )
    return build_model(settings, vocab_size=100, sequence_length=16, seed=seed, eos_id=3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_follows_its_settings_and_survives_saving(
    architecture: str, tmp_path: Path
) -> None:
    model = small(architecture)
    config = model.config
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (128, 64, 1)
    assert config.num_attention_heads == 2
    assert (config.max_position_embeddings, config.eos_token_id) == (16, 3)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    settings = ModelSettings.model_validate(
        {"architecture": architecture, "hidden_size": 64, "num_layers": 1}
    )
    assert planned_shape(settings, 100, 16) == model_shape(model)
    save_model(model, tmp_path / "a")
    loaded = load_model(str(tmp_path / "a"), dtype="float32", device=CPU)
    ids = torch.arange(16)[None]
    logits = model.eval()(input_ids=ids).logits
    assert logits.shape == (1, 16, 128)
    assert torch.equal(loaded.eval()(input_ids=ids).logits, logits)
    save_model(loaded, tmp_path / "b")
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "b").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_default_sizes_of_the_demo_model() -> None:
    model = build_model(ModelSettings(), vocab_size=4096, sequence_length=128, seed=0, eos_id=0)
    assert model.config.intermediate_size == 384
    assert model.num_parameters() == 950_912


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    first = small().state_dict()
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), drawn), "building a model moved the global generator"
    again, other = small().state_dict(), small(seed=1).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_untied_embeddings_and_longer_context() -> None:
    model = small(tie_embeddings=False, max_position=64)
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    assert model.config.max_position_embeddings == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"num_heads": 3}, "64 does not divide into 3 heads"), ({"max_position": 8}, "is below")],
)
def test_impossible_sizes_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        small(**changes)


def test_load_from_a_uri(tmp_path: Path) -> None:
    model = small()
    save_model(model, tmp_path)
    memory = fsspec.filesystem("memory")
    for path in tmp_path.iterdir():
        memory.pipe_file(f"/load-from-uri/{path.name}", path.read_bytes())
    loaded = load_model("memory://load-from-uri", dtype="bfloat16", device=CPU)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.bfloat16())


@pytest.mark.parametrize("path", ["/no/such/model", "./nothing", "memory://nothing-here", "pickle"])
def test_what_cannot_be_loaded_is_one_line(path: str, tmp_path: Path) -> None:
    if path == "pickle":
        model, path = small(), str(tmp_path)
        model.config.save_pretrained(tmp_path)
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError) as caught:
        load_model(path, dtype="auto", device=CPU)
    assert path in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("said", [True, False])
def test_config_json_says_whether_embeddings_are_tied(
    architecture: str, said: bool, tmp_path: Path
) -> None:
    """Whatever the configuration in memory says."""
    model = small(architecture)
    save_model(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is True
    tied = len(load_file(tmp_path / "model.safetensors"))
    weight = torch.nn.Parameter(model.get_input_embeddings().weight.detach() + 1)
    model.get_output_embeddings().weight = weight
    model.config.tie_word_embeddings = said
    save_model(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    saved = load_file(tmp_path / "model.safetensors").values()
    assert len(saved) == tied + 1 and {tensor.dtype for tensor in saved} == {torch.float32}
    assert any(torch.equal(tensor, weight) for tensor in saved)


def _prefixed(prefix: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {prefix + name: weight for name, weight in weights.items()}


BROKEN: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "one missing": (
        lambda w: {n: t for n, t in w.items() if n != "model.norm.weight"},
        r"not in the file: model\.norm\.weight[);]",
    ),
    "of a wrapper": (_prefixed("m."), r"in the architecture: m\.model\.embed_tokens\.weight and"),
    "of torch.compile": (_prefixed("_orig_mod."), r"_orig_mod\.model\.embed_tokens\.weight and"),
    "one too many": (
        lambda w: w | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)},
        r"but not in the architecture: model\.layers\.0\.self_attn\.q_proj\.bias\)",
    ),
    "another shape": (
        lambda w: {n: t[:90] if "embed" in n else t for n, t in w.items()},
        r"model\.embed_tokens\.weight has the shape \[90, 64\] in the file, \[128, 64\]",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_weights_that_would_be_random_are_refused(name: str, tmp_path: Path) -> None:
    """By loading a model, and by reading the headers of its files."""
    change, message = BROKEN[name]
    save_model(small(), tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    assert "lm_head.weight" not in weights  # tied, and not missing
    inspect_model(read_header(str(tmp_path), "prior"))
    edited = {n: w.contiguous() for n, w in change(weights).items()}
    save_file(edited, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=message):
        load_model(str(tmp_path), dtype="float32", device=CPU)
    with pytest.raises(ModelError, match=message):
        inspect_model(read_header(str(tmp_path), "prior"))


def test_text_to_text_models_are_refused_alike(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    T5ForConditionalGeneration(T5Config(vocab_size=64, **sizes)).save_pretrained(tmp_path)
    header = read_header(str(tmp_path), "model")
    assert inspect_model(header, encoder_decoder=True).vocab_size == 64
    with pytest.raises(ModelError, match=r"no decoder \(t5\): set `model.kind: encoder_decoder`"):
        inspect_model(header)
    file = tmp_path / "model.safetensors"
    weights = {n: w for n, w in load_file(file).items() if "encoder.final" not in n}
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"encoder\.final_layer_norm\.weight"):
        load_text_model(str(tmp_path), encoder_decoder=True, device=CPU)
    with pytest.raises(ModelError, match=r"encoder\.final_layer_norm\.weight"):
        inspect_model(read_header(str(tmp_path), "model"), encoder_decoder=True)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    model: Any = small()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert inspect_model(read_header(str(tmp_path), "prior")).vocab_size == 128
    shards[-1].unlink()
    with pytest.raises(ModelError, match=shards[-1].name):
        read_header(str(tmp_path), "prior")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model_type": "nobody_knows"}', "nobody_knows"),
        ("{", "config.json cannot be used"),
        ('{"model_type": "vit"}', "no language model of 'vit'"),
        ('{"model_type": "llama", "quantization_config": {"quant_method": "awq"}}', "quantised"),
    ],
)
def test_unusable_configurations_are_refused(content: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        inspect_model(ModelHeader("prior", content.encode(), {}))
