"""A causal model's sizes, read from its `config.json` without loading it."""

import json
from dataclasses import dataclass
from typing import Any

from stillhouse.cost import forward_flops
from stillhouse.errors import ModelError
from stillhouse.spec import ModelSettings
from stillhouse.storage.filesystem import absolute_uri, join, list_names, protocol_of, read_bytes

_TILE = 64  # tensor cores and vector units want whole ones


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes that decide what a model can be used for and what it costs."""

    vocab_size: int
    max_positions: int | None
    hidden_size: int
    num_layers: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    gated_mlp: bool

    def flops_per_token(self, sequence_length: int) -> int:
        """FLOPs of a forward pass for one token (`stillhouse.cost.forward_flops`)."""
        return forward_flops(
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            intermediate_size=self.intermediate_size,
            vocab_size=self.vocab_size,
            sequence_length=sequence_length,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            gated_mlp=self.gated_mlp,
        )

    def check(self, what: str, vocab_size: int, sequence_length: int) -> None:
        """Refuse a model that cannot read the sequences.

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
    """Where a model's files lie: a local folder or URI as it is; a hub name is downloaded.

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

    Raises:
        ModelError: as `planned_sizes`.
    """
    activation = "gelu" if model.architecture == "gpt_neox" else "silu"
    return shape_of(planned_sizes(model, vocab_size, sequence_length) | {"hidden_act": activation})


def shape_of(config: dict[str, Any]) -> ModelShape:
    """The shape that a transformers configuration describes; KeyError where it has no sizes."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    return ModelShape(
        vocab_size=config["vocab_size"],
        max_positions=config.get("max_position_embeddings"),
        hidden_size=hidden,
        num_layers=config["num_hidden_layers"],
        intermediate_size=config.get("intermediate_size") or 4 * hidden,
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        gated_mlp=config.get("hidden_act") in {"silu", "swish"},
    )


def read_config(folder: str) -> dict[str, Any]:
    """The transformers configuration in a folder.

    Raises:
        ModelError: there is no `config.json`, or it is no JSON.
    """
    try:
        return json.loads(read_bytes(join(folder, "config.json")))
    except FileNotFoundError:
        raise ModelError(f"{folder} holds no config.json: not a transformers model") from None
    except ValueError as error:
        raise ModelError(f"{folder}/config.json is not JSON: {error}") from None


def read_shape(folder: str) -> ModelShape:
    """The shape of the model in a folder.

    Raises:
        ModelError: no `config.json`, or not one of a causal language model.
    """
    try:
        return shape_of(read_config(folder))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{folder}/config.json is not a causal language model's: {error}"
        ) from None
