"""Causal language models: built from settings, loaded, saved, compiled, and their attention. Masked
ones are loaded and saved as they are.

transformers gives SDPA a dense mask [B, 1, T, T] wherever a model is compiled, which SDPA's fastest
kernels do not support. `causal_sdpa` is the same function under a name for which no mask is built:
causality is a flag then, on every device.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    GPTNeoXConfig,
    LlamaConfig,
    Olmo2Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from stillhouse.errors import ModelError
from stillhouse.models.device import initialised
from stillhouse.models.inspection import check_loaded
from stillhouse.models.masked_lm import is_masked_model
from stillhouse.models.shape import is_masked, planned_sizes
from stillhouse.spec import Dtype, ModelSettings
from stillhouse.storage.artifact import Manifest, Store
from stillhouse.storage.filesystem import absolute_uri, list_names, read_bytes
from stillhouse.storage.folders import local_folder, put_folder

Attention = Literal["auto", "sdpa", "eager", "flash_attention_2"]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "qwen3": Qwen3Config,
    "olmo2": Olmo2Config,
    "gpt_neox": GPTNeoXConfig,
}
_CAUSAL_SDPA = "causal_sdpa"
_SDPA_FROM = 256  # positions above which SDPA is faster than eager on CPUs (docs/measurements.md)

AttentionInterface.register(_CAUSAL_SDPA, sdpa_attention_forward)


def choose_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """The forward pass's dtype; `auto` is bfloat16 on GPUs and float32 (exact) on CPUs."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if dtype == "bfloat16" else torch.float32


def build_model(
    settings: ModelSettings, *, vocab_size: int, sequence_length: int, seed: int, eos_id: int
) -> PreTrainedModel:
    """A fresh float32 model on the CPU; its weights depend on the settings and the seed alone.

    Raises:
        ModelError: as `planned_sizes`.
    """
    sizes = planned_sizes(settings, vocab_size, sequence_length)
    special: dict[str, Any] = {"eos_token_id": eos_id, "bos_token_id": None, "pad_token_id": None}
    return _from_config(_CONFIGS[settings.architecture](**sizes, **special), seed)


def build_like(path: str, *, seed: int) -> PreTrainedModel:
    """A fresh float32 model on the CPU with the configuration of the one at `path`.

    Raises:
        ModelError: no configuration of a causal language model there.
    """
    with local_folder(absolute_uri(path), (".json",)) as folder:
        try:
            return _from_config(AutoConfig.from_pretrained(folder), seed)
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ModelError(
                f"model {path!r}: no fresh model can be made of its config.json: {reason}"
            ) from None


def _from_config(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    return initialised(lambda: AutoModelForCausalLM.from_config(config, dtype=torch.float32), seed)


def load_model(path: str, *, dtype: Dtype, device: torch.device) -> PreTrainedModel:
    """A model from a folder, an fsspec URI or the hub: safetensors only, none of its code is run.

    It is a causal one, or a masked one if its config.json says so (`is_masked`).

    Raises:
        ModelError: as `load_weights`.
    """
    model = load_weights(None, path, choose_dtype(dtype, device))
    return model.to(device)  # pyright: ignore[reportArgumentType]


def load_weights(kind: Any, path: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model on the CPU by one of transformers' `AutoModel...` classes; None: as `load_model`.

    Raises:
        ModelError: nothing there; not such a model in safetensors; weights that are missing, or
            that the architecture does not have.
    """
    with local_folder(absolute_uri(path), (".json", ".safetensors")) as folder:
        try:
            model, info = (kind or _kind_of(folder)).from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # `check_loaded` names them
            )
        except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
            reason = " ".join(str(error).replace(str(folder), path).split())[:300]
            raise ModelError(f"cannot load the model {path!r}: {reason}") from error
    check_loaded(info, f"the model {path!r}", masked=is_masked_model(model))
    return model


def _kind_of(folder: Path) -> Any:
    config = json.loads((folder / "config.json").read_text())
    return AutoModelForMaskedLM if is_masked(config) else AutoModelForCausalLM


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Write config.json and safetensors; equal weights give equal bytes.

    transformers 5 writes of every T5 that its embeddings are tied. 4.x believes it: it would tie
    them, and scale the decoder's outputs. So config.json is corrected.
    """
    network: Any = model
    # by default transformers saves on the first worker of a process group only
    network.should_save_on_this_rank = lambda _: True
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
    save: Callable[[Path], None] | None = None,
    inputs: dict[str, Any],
    settings: dict[str, Any],
    totals: dict[str, Any],
) -> Manifest:
    """Write a model and its tokenizer to the store as the artifact `name`.

    Args:
        store, name: where.
        model: unsharded, on the CPU.
        tokenizer: folder of the tokenizer.
        files: further files, by name.
        save: writes what is kept of the model; default `save_model`.
        inputs, settings, totals: of the manifest.
    """
    content = {**tokenizer_content(tokenizer), **(files or {})}

    def write(folder: Path) -> None:
        save(folder) if save else save_model(model, folder)
        for file, data in content.items():
            (folder / file).write_bytes(data)

    return put_folder(store, name, write, inputs=inputs, settings=settings, totals=totals)


def tokenizer_content(folder: str) -> dict[str, bytes]:
    """The files of the tokenizer in a folder, by name."""
    there = list_names(folder)
    return {n: read_bytes(f"{folder}/{n}") for n in TOKENIZER_FILES if n in there}


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The transformer layers: the first list of modules."""
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList))


def compile_layers(model: PreTrainedModel) -> None:
    """Compile each layer in place, for fixed shapes; one graph of the whole model takes longer."""
    for layer in layers_of(model):
        layer.compile(dynamic=False)


def set_attention(model: PreTrainedModel, attention: Attention, length: int) -> None:
    """Select the attention kernel for unpadded sequences of `length` tokens.

    `auto` is SDPA; eager where the architecture has no SDPA, or on the CPU below 256 tokens.

    Raises:
        ModelError: the architecture has no such kernel, or its package is not installed.
    """
    name = _kernel(model, attention, length)
    if model.config._attn_implementation == name:  # pyright: ignore[reportPrivateUsage]
        return
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        raise ModelError(
            f"`attention: {attention}` does not go with the architecture "
            f"{model.config.model_type!r}: {' '.join(str(error).split())[:200]}"
        ) from error


def _kernel(model: PreTrainedModel, attention: Attention, length: int) -> str:
    traits: Any = model
    if attention == "auto":
        short = model.device.type == "cpu" and length < _SDPA_FROM
        attention = "eager" if short or not traits._supports_sdpa else "sdpa"
    config: Any = model.config.get_text_config()
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    causal = all(window is None or window >= length for window in windows)
    causal = causal and not is_masked_model(model)
    if attention == "sdpa" and traits._supports_attention_backend and causal:
        return _CAUSAL_SDPA
    return attention
