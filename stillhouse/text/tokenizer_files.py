"""What a tokenizer's files say beside its vocabulary: special tokens, chat template."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from stillhouse.errors import ModelError
from stillhouse.storage.filesystem import join, read_bytes

_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json")
_SPECIAL = ("cls_token", "mask_token", "pad_token", "sep_token", "unk_token")
_TEMPLATE = "chat_template.jinja"
_ADDS_BOS = re.compile(r"(Gemma|Llama)Tokenizer(Fast)?")  # classes that do by default


Named = tuple[tuple[str, str], ...]
"""Special tokens by name, such as `mask_token`."""


def declared_tokens(folder: str, names: list[str]) -> tuple[Any, Any, bool, Named]:
    """EOS and BOS of the configuration files of a folder, whether BOS begins every sequence, and
    `masking_tokens`.
    """
    config: dict[str, Any] = {}
    for name in _CONFIGS:
        if name in names:
            try:
                content: dict[str, Any] = json.loads(read_bytes(join(folder, name)))
                config = {k: v for k, v in content.items() if v is not None} | config
            except (ValueError, AttributeError) as error:
                raise ModelError(f"{join(folder, name)} is not a JSON object: {error}") from error
    kind = str(config.get("tokenizer_class", ""))
    adds_bos = config.get("add_bos_token", _ADDS_BOS.fullmatch(kind) is not None)
    bos, masking = config.get("bos_token"), masking_tokens(config, folder)
    return config.get("eos_token"), bos, bool(adds_bos and bos), masking


def masking_tokens(config: Mapping[str, Any], folder: str) -> Named:
    """The special tokens of a tokenizer that declares a mask token, by name; none without one."""
    if not config.get("mask_token"):
        return ()
    found = {name: one_token(config.get(name), name, folder) for name in _SPECIAL}
    return tuple((name, token) for name, token in found.items() if token)


def put_around(backend: tokenizers.Tokenizer) -> tuple[str | None, str | None]:
    """The tokens that the post-processor puts before a text, and behind it, if it does."""
    plain = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a").ids
    if len(whole) <= len(plain):
        return None, None
    before = backend.id_to_token(whole[0]) if whole[:1] != plain[:1] else None
    return before, backend.id_to_token(whole[-1]) if whole[-1:] != plain[-1:] else None


def usual_masking(special: Sequence[str], before: str, behind: str) -> Named:
    """Those of BERT's or RoBERTa's tokenizer, whose configuration does not name them."""
    usual = {"mask_token": ("[MASK]", "<mask>"), "pad_token": ("[PAD]", "<pad>")}
    found = {name: next((t for t in tokens if t in special), "") for name, tokens in usual.items()}
    if not found["mask_token"]:
        return ()
    found |= {"cls_token": before, "sep_token": behind}
    return tuple(sorted((name, token) for name, token in found.items() if token))


def read_chat_template(folder: str, names: list[str]) -> str | None:
    """The chat template of a folder: a file of its own, or in the configuration, by itself or as
    `default` among several.
    """
    if _TEMPLATE in names:
        return read_bytes(join(folder, _TEMPLATE)).decode()
    if _CONFIGS[0] not in names:
        return None
    found: Any = json.loads(read_bytes(join(folder, _CONFIGS[0]))).get("chat_template")
    if isinstance(found, list):
        found = {one["name"]: one["template"] for one in found}.get("default")
    return found or None


def one_token(token: Any, key: str, folder: str) -> str | None:
    """A token as configurations write it: a string, an object with `content`, a list of one.

    Raises:
        ModelError: a list of several.
    """
    if isinstance(token, list):
        if len(token) != 1:
            raise ModelError(
                f"{folder}: `{key}` is a list of several tokens, {token}: set `tokenizer.{key}` to "
                "the one that stands between documents"
            )
        token = token[0]
    if isinstance(token, dict):
        token = token.get("content")
    return str(token) if token else None
