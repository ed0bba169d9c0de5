"""A language model's kind and sizes: what it can read and what it costs. Without torch, which the
driver never imports.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stillhouse.errors import ModelError
from stillhouse.spec import ModelSettings
from stillhouse.storage.filesystem import (
    absolute_uri,
    join,
    list_names,
    open_read,
    protocol_of,
    read_bytes,
)

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_HEADER_LENGTH = struct.Struct("<Q")
MASKED_ONLY = {
    *("albert", "convbert", "deberta", "deberta-v2", "distilbert", "esm", "eurobert", "ibert"),
    *("longformer", "mobilebert", "modernbert", "mpnet", "nomic_bert", "nystromformer"),
    *("squeezebert", "yoso"),
}
"""Architectures of text that are masked language models in transformers, and never causal ones."""


def is_masked(config: Mapping[str, Any]) -> bool:
    """Whether a model's config.json is that of a masked language model, such as BERT.

    BERT and RoBERTa exist as causal models too: `architectures` tells.
    """
    names: list[str] = config.get("architectures") or []
    if any(name.endswith("ForMaskedLM") for name in names):
        return True
    return config.get("model_type") in MASKED_ONLY


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes that decide what a model can be used for and what it costs.

    Attributes:
        architecture: transformers' `model_type`.
        vocab_size: rows of the embeddings.
        max_positions: longest sequence; None: no limit.
        matmul_parameters: weights that one token is multiplied with: all matrices, of experts the
            active ones, with the output embeddings and without the input embeddings.
        attention_width: heads times head width, summed over all layers with attention.
        masked: a masked language model. Its tokens see all others, and its output embeddings are
            counted by 15 %, the share of the tokens that it predicts by default.
    """

    architecture: str
    hidden_size: int
    vocab_size: int
    max_positions: int | None
    matmul_parameters: int
    attention_width: int
    masked: bool = False

    def flops_per_token(self, sequence_length: int) -> int:
        """FLOPs of a forward pass for one token; training takes three times as many.

        Two per weight, and attention: scores and values, two each, over T keys, causal over T / 2
        on average. Norms, softmax and recurrent scans are not counted.
        """
        per_key = 4 if self.masked else 2
        return 2 * self.matmul_parameters + per_key * sequence_length * self.attention_width

    def check(self, what: str, vocab_size: int, sequence_length: int) -> None:
        """Check that a model can read sequences of this length, BOS included.

        Raises:
            ModelError: its vocabulary is smaller than the tokenizer's, or its context too short.
        """
        if self.vocab_size < vocab_size:
            raise ModelError(
                f"{what} has {self.vocab_size} embeddings, the tokenizer needs {vocab_size}: give "
                "the tokenizer that the model was trained with (`tokenizer.path`)"
            )
        if self.max_positions is not None and self.max_positions < sequence_length:
            raise ModelError(
                f"{what} reads at most {self.max_positions} tokens, `sequence_length` is "
                f"{sequence_length}"
            )


def not_causal(what: str) -> str:
    """What is said of a masked language model where a causal one is needed."""
    return (
        f"{what} is a masked language model, which gives texts no likelihood: give a causal one "
        "(`job: train` trains masked ones further, by `train.objective: masked_tokens`)"
    )


def model_uri(path: str) -> str:
    """The folder of a model: a local folder or URI unchanged; a hub name is downloaded to this
    machine.

    Raises:
        ModelError: nothing there, and the hub has no such name (or cannot be reached).
    """
    uri = absolute_uri(path)
    if list_names(uri):
        return uri
    if protocol_of(uri) != "file" or path.startswith((".", "/", "~")):
        raise ModelError(f"model {path!r}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(path, allow_patterns=["*.json", "*.safetensors"])
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"model {path!r} is neither a folder here nor to be had from the hub ({reason})"
        ) from None


@dataclass(frozen=True, slots=True)
class ModelHeader:
    """A model's folder without its weights: enough to inspect it on any machine.

    Attributes:
        what: name for error messages.
        config: bytes of `config.json`.
        shapes: shape of every stored tensor, by name.
    """

    what: str
    config: bytes
    shapes: dict[str, tuple[int, ...]]

    @property
    def masked(self) -> bool:
        """Whether it is a masked language model."""
        try:
            return is_masked(json.loads(self.config))
        except (ValueError, AttributeError):  # `inspect_model` says what is wrong with it
            return False

    def check_causal(self) -> None:
        """Refuse a masked language model.

        Raises:
            ModelError: it is one.
        """
        if self.masked:
            raise ModelError(not_causal(self.what))


def read_header(folder: str, what: str) -> ModelHeader:
    """Read a model's configuration and the headers of its weight files.

    Raises:
        ModelError: no configuration, no weights in safetensors, or a missing file.
    """
    there = set(list_names(folder))
    if "config.json" not in there and "adapter_config.json" in there:
        raise ModelError(
            f"{what} holds adapters and not their model: train with `lora.save: merged`, or merge "
            "them (`merge_and_unload` of peft)"
        )
    if "config.json" not in there:
        raise ModelError(f"{what} holds no config.json: not a transformers model")
    if WEIGHTS in there:
        files = [WEIGHTS]
    elif INDEX in there:
        files = sorted({*json.loads(read_bytes(join(folder, INDEX)))["weight_map"].values()})
    else:
        raise ModelError(f"{what} holds no safetensors weights ({WEIGHTS}, or {INDEX})")
    lost = sorted({*files} - there)
    if lost:
        raise ModelError(f"{what} lacks {lost[0]}, which {INDEX} names")
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with open_read(join(folder, file)) as stream:
                (length,) = _HEADER_LENGTH.unpack(stream.read(_HEADER_LENGTH.size))
                tensors = json.loads(stream.read(length))
        except (ValueError, struct.error) as error:
            raise ModelError(f"{what}: {file} is not a safetensors file: {error}") from error
        tensors.pop("__metadata__", None)
        shapes |= {name: tuple(tensor["shape"]) for name, tensor in tensors.items()}
    return ModelHeader(what, read_bytes(join(folder, "config.json")), shapes)


def planned_sizes(settings: ModelSettings, vocab_size: int, sequence_length: int) -> dict[str, Any]:
    """The sizes of a fresh model, as its transformers configuration names them.

    Raises:
        ModelError: the width is no multiple of twice the number of heads (rotary embeddings rotate
            pairs), or the context is shorter than the sequences.
    """
    width, heads = settings.hidden_size, default_heads(settings)
    if width % (2 * heads):
        raise ModelError(
            f"`model.hidden_size` {width} does not divide into {heads} heads of an even width: "
            "change `model.num_heads` or `model.hidden_size`"
        )
    positions = settings.max_position or sequence_length
    if positions < sequence_length:
        raise ModelError(
            f"`model.max_position` {positions} is below `sequence_length` {sequence_length}"
        )
    sizes: dict[str, Any] = {
        "vocab_size": round_up(vocab_size),
        "hidden_size": width,
        "num_hidden_layers": settings.num_layers,
        "num_attention_heads": heads,
        "intermediate_size": default_mlp(settings),
        "max_position_embeddings": positions,
        "tie_word_embeddings": settings.tie_embeddings,
    }
    if settings.architecture != "gpt_neox":
        sizes |= {"num_key_value_heads": heads, "head_dim": width // heads}
    return sizes


def default_heads(settings: ModelSettings) -> int:
    """`num_heads`; by default heads of 64, or of 32 below a width of 256."""
    width = settings.hidden_size
    return settings.num_heads or max(1, width // (64 if width >= 256 else 32))


def default_mlp(settings: ModelSettings) -> int:
    """`intermediate_size`; by default 8/3 of the width."""
    return settings.intermediate_size or round_up(round(settings.hidden_size * 8 / 3))


def round_up(number: int) -> int:
    """To a multiple of 64, for whole tiles of tensor cores and vector units."""
    return -(-number // 64) * 64


def planned_shape(model: ModelSettings, vocab_size: int, sequence_length: int) -> ModelShape:
    """The shape of a fresh model.

    A layer has four H x H matrices for the attention and three H x I for the MLP (GPT-NeoX two: its
    MLP has no gate).

    Raises:
        ModelError: as `planned_sizes`.
    """
    sizes = planned_sizes(model, vocab_size, sequence_length)
    width, layers, vocab = sizes["hidden_size"], sizes["num_hidden_layers"], sizes["vocab_size"]
    mlp = (2 if model.architecture == "gpt_neox" else 3) * width * sizes["intermediate_size"]
    return ModelShape(
        architecture=model.architecture,
        hidden_size=width,
        vocab_size=vocab,
        max_positions=sizes["max_position_embeddings"],
        matmul_parameters=layers * (4 * width**2 + mlp) + vocab * width,
        attention_width=layers * width,
    )
