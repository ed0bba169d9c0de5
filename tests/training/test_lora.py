"""Adapters in a training's worker: what is trained, kept and saved, against peft and by hand."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import own_nll
from safetensors.numpy import load_file
from training_parts import LENGTH, write_part
from trainings import tokens_of, train_task

from stillhouse.errors import ModelError
from stillhouse.models.causal_lm import save_model
from stillhouse.storage.artifact import Store
from stillhouse.storage.commit import check_store
from stillhouse.training.checkpoint import Checkpoints
from stillhouse.training.fetch import PartReader, read_ahead
from stillhouse.training.spec import LoraSettings
from stillhouse.training.task import StartModel
from stillhouse.training.worker import streamed_batches, train_worker

STEPS, RANK, ALPHA = 6, 3, 12
VOCAB = 300


def networks():
    """A Llama with tied embeddings, and a GPT-2, whose layers hold their weights transposed."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": VOCAB}
    llama = LlamaConfig(**sizes, **heads, max_position_embeddings=16, tie_word_embeddings=True)
    gpt2 = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=VOCAB, n_positions=16)
    return {"llama": LlamaForCausalLM(llama), "gpt2": GPT2LMHeadModel(gpt2)}


@pytest.fixture(scope="module")
def place(untrained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    for name, network in networks().items():
        (folder / name).mkdir()
        save_model(network, folder / name)
    rng = np.random.default_rng(0)
    for i, rows in enumerate((40, 6)):
        ids = (rng.integers(0, 250, (rows, 1)) + np.arange(LENGTH)) % 250
        write_part(str(folder / f"{i}.parquet"), ids.astype(np.uint16), ["sea", "law"])
    return folder, untrained["tokenizer"]["path"]


@pytest.fixture
def store(tmp_path):
    return Store(check_store(str(tmp_path / "store")))


def task_of(place, network="llama", settings=None, **lora):
    folder, tokenizer = place
    adapters = LoraSettings.model_validate({"rank": RANK, "alpha": ALPHA} | lora)
    return train_task(
        tokens_of(folder / "0.parquet"),
        tokenizer,
        STEPS,
        init=StartModel(str(folder / network), network, lora=adapters),
        heldout=tokens_of(folder / "1.parquet", name="heldout"),
        settings={"learning_rate": 3e-2, "checkpoint_every": 2, "warmup": 0.0} | (settings or {}),
    )


class LostError(Exception):
    pass


def run(store, task, stop=None):
    """Train, or raise after a step; the folder of the model, and the losses."""
    found = []

    def tell(kind, content):
        if kind == "point":
            found.append(content["loss"])
        if kind == "point" and content["step"] == stop:
            raise LostError

    fetch = read_ahead(PartReader.of(task.data), 8)
    train_worker(store, task, partial(streamed_batches, task, fetch), tell)
    return Path(store.path("models", task.fingerprint).removeprefix("file://")), found


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(2 * LENGTH).reshape(2, LENGTH)).logits.numpy()


@pytest.mark.parametrize("network", ["llama", "gpt2"])
def test_merged_is_the_model_with_the_adapters_that_peft_reads(place, store, network):
    """peft puts the saved factors on the start; and one layer is added up by hand."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    whole, _ = run(store, task_of(place, network))
    factors, _ = run(store, task_of(place, network, save="adapter"))
    start = place[0] / network
    made = AutoModelForCausalLM.from_pretrained(whole)
    base = AutoModelForCausalLM.from_pretrained(start)
    untouched = logits(base)
    by_peft = logits(PeftModel.from_pretrained(base, factors).eval())
    np.testing.assert_allclose(logits(made), by_peft, atol=2e-5)
    assert np.abs(by_peft - untouched).max() > 0.05
    small = load_file(factors / "adapter_model.safetensors")
    before, after = (load_file(f / "model.safetensors") for f in (start, whole))
    touched = {n.split("base_model.model.")[1].split(".lora_")[0] + ".weight" for n in small}
    for name, value in before.items():
        if name not in touched and f"transformer.{name}" not in touched:
            np.testing.assert_array_equal(value, after[name])
    layer = next(name for name in sorted(small) if name.endswith("lora_A.weight"))
    a, b = small[layer].astype(np.float64), small[layer.replace("lora_A", "lora_B")]
    name = layer.split("base_model.model.")[1].replace("lora_A.weight", "weight")
    name = name if name in before else name.removeprefix("transformer.")
    added = ALPHA / RANK * b.astype(np.float64) @ a
    moved = after[name].astype(np.float64) - before[name]
    np.testing.assert_allclose(moved, added.T if network == "gpt2" else added, atol=1e-6)
    assert np.linalg.matrix_rank(added) == RANK


def test_all_linear_layers_but_the_head_have_adapters(place, store):
    factors, _ = run(store, task_of(place, save="adapter"))
    layers = {name.split(".lora_")[0] for name in load_file(factors / "adapter_model.safetensors")}
    kinds = {name.rsplit(".", 1)[-1] for name in layers}
    assert kinds == {*["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
    assert len(layers) == 2 * 7
    assert not (factors / "config.json").exists()


def test_it_starts_as_the_given_model_and_learns(place, store):
    from transformers import AutoModelForCausalLM

    task = task_of(place, settings={"global_batch": 40, "lanes": 1, "window": 40})
    folder, found = run(store, task)
    base = AutoModelForCausalLM.from_pretrained(place[0] / "llama")
    rows = np.array(tokens(place[0] / "0.parquet"))
    assert found[0] == pytest.approx(own_nll(base, rows).mean(), abs=1e-5)  # one batch: all rows
    made = AutoModelForCausalLM.from_pretrained(folder)
    held = np.array(tokens(place[0] / "1.parquet"))
    before, after = (own_nll(model, held).mean() for model in (base, made))
    curve = store.get_manifest("models", task.fingerprint).totals["curve"]
    assert after < before - 0.05 and curve[-1][1] == pytest.approx(after, abs=1e-5)


def tokens(path):
    import pyarrow.parquet as pq

    return pq.read_table(path)["input_ids"].to_pylist()


def test_a_killed_training_ends_in_the_same_bytes_and_keeps_the_factors_alone(
    place, store, tmp_path
):
    """The GPT-2 has dropout."""
    for network, save in (("gpt2", "merged"), ("llama", "adapter")):
        task = task_of(place, network, save=save)
        run(store, task)
        other = Store(check_store(str(tmp_path / save)))
        with pytest.raises(LostError):
            run(other, task, stop=5)
        run(other, task)
        first, second = (s.get_manifest("models", task.fingerprint) for s in (store, other))
        assert first.files == second.files
    kept = Checkpoints(other, task.checkpoints).load(STEPS).tensors
    # two layers of: queries, keys, values, output; gate, up, down
    sizes = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    weights = sum(value.numel() for name, value in kept.items() if name.startswith("model."))
    assert weights == 2 * RANK * sum(a + b for a, b in sizes)


def test_layers_that_are_not_there_and_the_head_are_refused(place, store):
    layers = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    for wrong in ("query", "input_layernorm", "lm_head", "embed_tokens"):
        message = f"`lora.targets`: {wrong}: adapters .* which the model calls {layers}$"
        with pytest.raises(ModelError, match=message):
            run(store, task_of(place, targets=["q_proj", wrong]))
    with pytest.raises(ModelError, match=r"`lora.rank: 33` is above the 32 rows or columns"):
        run(store, task_of(place, rank=33))


def test_a_part_of_a_path_names_layers_too(place, store):
    factors, _ = run(store, task_of(place, targets=["0.self_attn.q_proj"], save="adapter"))
    names = load_file(factors / "adapter_model.safetensors")
    assert {name.split(".lora_")[0].rsplit("layers.", 1)[-1] for name in names} == {
        "0.self_attn.q_proj"
    }
