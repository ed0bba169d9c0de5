import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

from stillhouse.errors import ModelError, SpecError
from stillhouse.models.causal_lm import (
    build_model,
    choose_device,
    choose_dtype,
    load_model,
    save_model,
)
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
def test_build_follows_the_settings(architecture: str) -> None:
    model = small(architecture)
    config = model.config
    assert config.vocab_size == 128
    assert (config.hidden_size, config.num_hidden_layers) == (64, 1)
    assert config.num_attention_heads == 2
    assert config.max_position_embeddings == 16
    assert config.eos_token_id == 3
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model(input_ids=torch.arange(16)[None]).logits.shape == (1, 16, 128)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_planned_shape_is_that_of_the_model(architecture: str) -> None:
    settings = ModelSettings.model_validate({"architecture": architecture, "hidden_size": 64})
    model = build_model(settings, vocab_size=100, sequence_length=16, seed=0, eos_id=3)
    assert planned_shape(settings, 100, 16) == model_shape(model)


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
    torch.manual_seed(6)
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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_save_and_load_keep_every_bit(architecture: str, tmp_path: Path) -> None:
    model = small(architecture)
    save_model(model, tmp_path)
    loaded = load_model(str(tmp_path), dtype="float32", device=CPU)
    ids = torch.arange(16)[None]
    assert torch.equal(loaded.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_equal_weights_are_equal_bytes(tmp_path: Path) -> None:
    save_model(small(), tmp_path / "a")
    loaded = load_model(str(tmp_path / "a"), dtype="float32", device=CPU)
    save_model(loaded, tmp_path / "b")
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "b").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_load_from_a_uri(tmp_path: Path) -> None:
    import fsspec

    model = small()
    save_model(model, tmp_path)
    memory = fsspec.filesystem("memory")
    for path in tmp_path.iterdir():
        memory.pipe_file(f"/load-from-uri/{path.name}", path.read_bytes())
    loaded = load_model("memory://load-from-uri", dtype="bfloat16", device=CPU)
    expected = model.lm_head.weight.bfloat16()
    assert torch.equal(loaded.lm_head.weight, expected)


@pytest.mark.parametrize("path", ["/no/such/model", "./nothing", "memory://nothing-here"])
def test_a_missing_model_is_one_line(path: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(path, dtype="auto", device=CPU)
    assert path in str(caught.value) and "\n" not in str(caught.value)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    model = small()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot load the model") as caught:
        load_model(str(tmp_path), dtype="auto", device=CPU)
    assert "\n" not in str(caught.value)


def test_saved_weights_are_float32_and_shared_once(tmp_path: Path) -> None:
    save_model(small(), tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as tensors:
        names = set(tensors.keys())
        assert tensors.get_tensor("model.embed_tokens.weight").dtype == torch.float32
    assert "lm_head.weight" not in names
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("said", [True, False])
def test_a_config_says_of_a_model_what_it_is(architecture: str, said: bool, tmp_path: Path) -> None:
    model = small(architecture)
    weight = torch.nn.Parameter(model.get_input_embeddings().weight.detach() + 1)
    model.get_output_embeddings().weight = weight
    model.config.tie_word_embeddings = said
    save_model(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    with safe_open(tmp_path / "model.safetensors", "pt") as tensors:
        saved = [tensors.get_tensor(name) for name in tensors.keys()]  # noqa: SIM118
    assert any(torch.equal(tensor, weight) for tensor in saved)


def test_choices_by_device() -> None:
    cuda = torch.device("cuda")
    assert choose_device("auto", 0) == CPU == choose_device("cpu", 1)
    assert choose_dtype("auto", CPU) == torch.float32 == choose_dtype("float32", cuda)
    assert choose_dtype("auto", cuda) == torch.bfloat16 == choose_dtype("bfloat16", CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize(("device", "gpus"), [("auto", 1), ("cuda", 0), ("cuda", 1)])
def test_cuda_without_a_gpu(device: str, gpus: float) -> None:
    with pytest.raises(SpecError, match=r"compute\.gpus_per_worker"):
        choose_device(device, gpus)


def _edited(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """A saved model of tied embeddings whose file holds other weights."""
    save_model(small(), folder)
    file = folder / "model.safetensors"
    weights = change(load_file(file))
    save_file({n: w.contiguous() for n, w in weights.items()}, file, metadata={"format": "pt"})
    return folder


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
    """Where a model is loaded, and where only its files' headers are read."""
    change, message = BROKEN[name]
    folder = str(_edited(tmp_path, change))
    with pytest.raises(ModelError, match=message):
        load_model(folder, dtype="float32", device=CPU)
    with pytest.raises(ModelError, match=message):
        inspect_model(read_header(folder, "prior"))


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
    for load in (
        lambda: load_text_model(str(tmp_path), encoder_decoder=True, device=CPU),
        lambda: inspect_model(read_header(str(tmp_path), "model"), encoder_decoder=True),
    ):
        with pytest.raises(ModelError, match=r"encoder\.final_layer_norm\.weight"):
            load()


def test_a_tied_head_is_no_missing_weight(tmp_path: Path) -> None:
    save_model(small(), tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    load_model(str(tmp_path), dtype="float32", device=CPU)
    inspect_model(read_header(str(tmp_path), "prior"))


def test_a_shard_that_is_not_there_is_named(tmp_path: Path) -> None:
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
def test_configurations_that_cannot_be_used(content: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        inspect_model(ModelHeader("prior", content.encode(), {}))
