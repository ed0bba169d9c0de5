"""Causal language models: made from settings, loaded and saved as transformers folders."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    Olmo2Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from stillhouse.errors import ModelError
from stillhouse.models.device import choose_device as choose_device
from stillhouse.models.inspection import check_loaded
from stillhouse.models.seeded import initialised
from stillhouse.models.shape import planned_sizes
from stillhouse.spec import Dtype, ModelSettings
from stillhouse.storage.artifact import Manifest, Store
from stillhouse.storage.filesystem import absolute_uri, list_names, read_bytes
from stillhouse.storage.folders import local_folder, put_folder

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "qwen3": Qwen3Config,
    "olmo2": Olmo2Config,
    "gpt_neox": GPTNeoXConfig,
}


def choose_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """The forward pass's dtype; `auto` is bfloat16 on GPUs and float32 (exact) on CPUs."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if dtype == "bfloat16" else torch.float32


def model_config(
    settings: ModelSettings, *, vocab_size: int, sequence_length: int, eos_id: int
) -> PreTrainedConfig:
    """The transformers configuration of `planned_sizes`.

    Raises:
        ModelError: as `planned_sizes`.
    """
    sizes = planned_sizes(settings, vocab_size, sequence_length)
    special: dict[str, Any] = {"eos_token_id": eos_id, "bos_token_id": None, "pad_token_id": None}
    return _CONFIGS[settings.architecture](**sizes, **special)


def build_model(
    settings: ModelSettings, *, vocab_size: int, sequence_length: int, seed: int, eos_id: int
) -> PreTrainedModel:
    """A fresh float32 model on the CPU; its weights depend on the settings and the seed alone.

    Raises:
        ModelError: as `model_config`.
    """
    config = model_config(
        settings, vocab_size=vocab_size, sequence_length=sequence_length, eos_id=eos_id
    )
    return initialised(lambda: AutoModelForCausalLM.from_config(config, dtype=torch.float32), seed)


def build_like(path: str, *, seed: int) -> PreTrainedModel:
    """A fresh float32 model on the CPU with the configuration of the one at `path`.

    Raises:
        ModelError: no configuration of a causal language model there.
    """
    with local_folder(absolute_uri(path), (".json",)) as folder:
        try:
            config = AutoConfig.from_pretrained(folder)
            return initialised(
                lambda: AutoModelForCausalLM.from_config(config, dtype=torch.float32), seed
            )
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ModelError(
                f"model {path!r}: no fresh model can be made of its config.json: {reason}"
            ) from None


def load_model(path: str, *, dtype: Dtype, device: torch.device) -> PreTrainedModel:
    """A model from a folder, an fsspec URI or the hub: safetensors only, no code from there.

    Raises:
        ModelError: as `load_weights`.
    """
    model = load_weights(AutoModelForCausalLM, path, choose_dtype(dtype, device))
    return model.to(device)  # pyright: ignore[reportArgumentType]


def load_weights(kind: Any, path: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model by one of transformers' `AutoModel...` classes, on the CPU, every weight as stored.

    Raises:
        ModelError: nothing there; not such a model in safetensors; weights that are missing, or
            that the architecture does not know.
    """
    with local_folder(absolute_uri(path), (".json", ".safetensors")) as folder:
        try:
            model, info = kind.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # `check_loaded` says which
            )
        except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
            reason = " ".join(str(error).replace(str(folder), path).split())[:300]
            raise ModelError(f"cannot load the model {path!r}: {reason}") from error
    check_loaded(info, f"the model {path!r}")
    return model


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Write config.json and safetensors; the same weights give the same bytes.

    transformers 5 writes of every T5 that its embeddings are tied, which 4.x believes: it would
    tie them, and scale the decoder's outputs.
    """
    network: Any = model
    network.should_save_on_this_rank = lambda _: (
        True
    )  # else only the first of a group's workers may
    model.save_pretrained(folder)
    del network.should_save_on_this_rank
    head, path = model.get_output_embeddings(), folder / "config.json"
    if head is None:
        return
    config = json.loads(path.read_text())
    config["tie_word_embeddings"] = head.weight is model.get_input_embeddings().weight
    if hasattr(model.config, "scale_decoder_outputs"):  # else 5 infers it from the line above
        config["scale_decoder_outputs"] = model.config.scale_decoder_outputs
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def commit_model(
    store: Store,
    name: str,
    model: PreTrainedModel,
    tokenizer: str,
    *,
    files: Mapping[str, bytes] | None = None,
    inputs: dict[str, Any],
    settings: dict[str, Any],
    totals: dict[str, Any],
) -> Manifest:
    """Put a model with its tokenizer into the store as the artifact `name`.

    Args:
        store, name: where.
        model: whole, on the CPU.
        tokenizer: folder of the tokenizer whose files go beside the weights.
        files: more of them, by name.
        inputs, settings, totals: of the manifest.

    Raises:
        StorageError: as `put_folder`.
    """
    there = list_names(tokenizer)
    found = {n: read_bytes(f"{tokenizer}/{n}") for n in TOKENIZER_FILES if n in there}

    def save(folder: Path) -> None:
        save_model(model, folder)
        for file, content in {**found, **(files or {})}.items():
            (folder / file).write_bytes(content)

    return put_folder(store, name, save, inputs=inputs, settings=settings, totals=totals)
