"""A causal model's sizes: what it can read and what it costs. Without torch, for the driver."""

import json
import struct
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
_TILE = 64  # tensor cores and vector units want whole ones


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes that decide what a model can be used for and what it costs.

    Attributes:
        architecture: its `model_type`, as transformers call it.
        hidden_size: its width.
        vocab_size: rows of its embeddings.
        max_positions: longest sequence it reads; None where there is no limit.
        matmul_parameters: weights of the matrices that one token is multiplied with, the output
            embeddings included, the look-up of input embeddings not; of experts, the active ones.
        attention_width: heads times width of a head, over all layers with attention.
    """

    architecture: str
    hidden_size: int
    vocab_size: int
    max_positions: int | None
    matmul_parameters: int
    attention_width: int

    def flops_per_token(self, sequence_length: int) -> int:
        """FLOPs of a forward pass for one token; training on one takes three times that.

        Two for each weight, and causal attention: scores and values, two each, with T / 2 keys on
        average. Norms, softmax and recurrent scans are left out.
        """
        return 2 * self.matmul_parameters + 2 * sequence_length * self.attention_width

    def check(self, what: str, vocab_size: int, sequence_length: int) -> None:
        """Refuse a model that cannot read the sequences, a BOS token before them included.

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


def model_uri(path: str) -> str:
    """Where a model's files lie: a local folder or URI as it is; a hub name is downloaded, for
    this machine alone.

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
    """What a model's folder says of it, apart from the weights: enough to inspect it anywhere.

    Attributes:
        what: it is called in errors.
        config: the bytes of `config.json`.
        shapes: of every stored tensor, by name.
    """

    what: str
    config: bytes
    shapes: dict[str, tuple[int, ...]]


def read_header(folder: str, what: str) -> ModelHeader:
    """Read the small part of a model's folder.

    Raises:
        ModelError: no configuration, no weights in safetensors, or not all of their files.
    """
    there = set(list_names(folder))
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

    The vocabulary is rounded up to a multiple of 64.

    Raises:
        ModelError: the width is no multiple of twice the number of heads (rotary positions turn
            pairs), or the context is shorter than the sequences.
    """
    width = settings.hidden_size
    heads = settings.num_heads or max(1, width // (64 if width >= 256 else 32))
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
        "vocab_size": _round_up(vocab_size),
        "hidden_size": width,
        "num_hidden_layers": settings.num_layers,
        "num_attention_heads": heads,
        "intermediate_size": settings.intermediate_size or _round_up(round(width * 8 / 3)),
        "max_position_embeddings": positions,
        "tie_word_embeddings": settings.tie_embeddings,
    }
    if settings.architecture != "gpt_neox":
        sizes |= {"num_key_value_heads": heads, "head_dim": width // heads}
    return sizes


def _round_up(number: int) -> int:
    return -(-number // _TILE) * _TILE


def planned_shape(model: ModelSettings, vocab_size: int, sequence_length: int) -> ModelShape:
    """The shape that a model of these settings will have.

    A layer's matrices: four of H x H around the attention, and an MLP of three of H x I (two for
    GPT-NeoX, whose MLP has no gate).

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
