"""Tokenizers: a byte-level BPE trained on a sample of the pool, or one that exists already.

A tokenizer is its `tokenizer.json` and the token that stands between documents (EOS). Text is
always taken literally: "<|endoftext|>" inside a document becomes ordinary tokens, never an EOS,
and neither beginning- nor end-of-sequence tokens are added.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, trainers

from stillhouse.errors import ModelError
from stillhouse.fingerprint import canonical_json, sha256
from stillhouse.storage.filesystem import absolute_uri, join, list_names, read_bytes

EOS_TOKEN = "<|endoftext|>"
PAD_TOKEN = "<|pad|>"
_COMMON_EOS = (EOS_TOKEN, "</s>", "<eos>", "<|end_of_text|>")
_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A tokenizer ready for use; it can be pickled.

    Attributes:
        json: canonical `tokenizer.json`.
        eos_token, eos_id: the token between documents.
        vocab_size: largest id plus one, what an embedding matrix must hold.
        digest: hex SHA-256 of `json`.
        backend: the `tokenizers` object.
    """

    json: bytes
    eos_token: str
    eos_id: int
    vocab_size: int
    digest: str
    backend: tokenizers.Tokenizer

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """The ids of each text, without special tokens; uint32 [n]."""
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """The text of some ids, special tokens included; exact for byte-level tokenizers."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as `json`: the backend's own pickle forgets `encode_special_tokens`."""
        return make_tokenizer, (self.json, self.eos_token)


def in_sample(document_hash: bytes, share: float) -> bool:
    """Whether a document is in the tokenizer's training sample: `share` of all, by its hash alone.

    The same document is in or out whatever else is in the pool and whoever asks.
    """
    digest = hashlib.blake2b(document_hash, digest_size=8, person=b"tokenizer sample").digest()
    return int.from_bytes(digest, "big") < share * 2**64


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> bytes:
    """Train a byte-level BPE: `tokenizer.json` as canonical bytes, the same for the same texts.

    Ids 0 and 1 are `<|endoftext|>` and `<|pad|>`, then the 256 bytes, then merges; fewer than
    `vocab_size` ids come out where the texts hold too few pairs.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[EOS_TOKEN, PAD_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return canonical_json(json.loads(tokenizer.to_str()))


def make_tokenizer(
    tokenizer_json: bytes, eos_token: str | None, place: str = "the tokenizer"
) -> Tokenizer:
    """A tokenizer from the content of its `tokenizer.json`.

    Args:
        tokenizer_json: as written by `tokenizers` or by `train_tokenizer`.
        eos_token: the token between documents; None takes a common one that is there.
        place: where it came from, for errors.

    Raises:
        ModelError: not a tokenizer, or no such token.
    """
    try:
        content = canonical_json(json.loads(tokenizer_json))
        backend = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the Rust side raises plain Exception
        raise ModelError(f"{place} is not a tokenizer.json: {_in_one_line(error)}") from error
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # text that spells a special token is only text
    vocabulary = backend.get_vocab(with_added_tokens=True)
    eos_token = _pick_eos(vocabulary, eos_token, place)
    return Tokenizer(
        json=content,
        eos_token=eos_token,
        eos_id=vocabulary[eos_token],
        vocab_size=max(vocabulary.values()) + 1,
        digest=sha256(content),
        backend=backend,
    )


def _pick_eos(vocabulary: dict[str, int], eos_token: str | None, place: str) -> str:
    for token in [eos_token] if eos_token is not None else _COMMON_EOS:
        if token in vocabulary:
            return token
    asked = eos_token if eos_token is not None else " or ".join(_COMMON_EOS)
    raise ModelError(
        f"{place}: no end-of-document token {asked} in its vocabulary; set `tokenizer.eos_token`"
    )


def load_tokenizer(path: str, eos_token: str | None = None) -> Tokenizer:
    """Load a tokenizer from a `tokenizer.json`, a transformers folder, or the hub.

    Args:
        path: local path or fsspec URI of the file or folder, else a name on the hub.
        eos_token: the token between documents; default what its configuration says.

    Raises:
        ModelError: nothing there, not a tokenizer, no EOS; SentencePiece or another slow format
            that transformers cannot convert with what is installed.
    """
    uri = absolute_uri(path)
    folder, file_name = uri.rsplit("/", 1) if uri.endswith(".json") else (uri, "tokenizer.json")
    names = list_names(folder)
    if not names:
        if "://" in path or path.startswith((".", "/", "~")):
            raise ModelError(f"tokenizer {path!r}: no such file or folder (`tokenizer.path`)")
        return load_tokenizer(_from_hub(path), eos_token)
    if file_name in names:
        declared = eos_token or _declared_eos(folder, names)
        return make_tokenizer(read_bytes(join(folder, file_name)), declared, path)
    if uri.endswith(".json"):
        raise ModelError(f"tokenizer {path!r}: no such file (`tokenizer.path`)")
    return _convert(folder, names, eos_token, path)


def _declared_eos(folder: str, names: list[str]) -> str | None:
    """The EOS that the configuration files beside a tokenizer.json name."""
    for name in _CONFIGS:
        if name in names:
            try:
                token = json.loads(read_bytes(join(folder, name))).get("eos_token")
            except (ValueError, AttributeError) as error:
                raise ModelError(f"{join(folder, name)} is not a JSON object: {error}") from error
            token = token.get("content") if isinstance(token, dict) else token
            if token:
                return str(token)
    return None


def _from_hub(name: str) -> str:
    """Download the small files of a hub repository; the local folder."""
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, allow_patterns=["*.json", "*.model", "*.txt"])
    except (OSError, ValueError) as error:
        raise ModelError(
            f"tokenizer {name!r} is neither a file or folder here, nor can it be had from the hub "
            f"({_in_one_line(error)}); set `tokenizer.path`"
        ) from error


def _convert(folder: str, names: list[str], eos_token: str | None, path: str) -> Tokenizer:
    """A folder without tokenizer.json (vocabulary and merges, SentencePiece) by transformers."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as local:
        for name in names:
            if name.endswith((".json", ".model", ".txt")):
                (Path(local) / name).write_bytes(read_bytes(join(folder, name)))
        try:
            fast: Any = AutoTokenizer.from_pretrained(local)
            content = fast.backend_tokenizer.to_str().encode()
        except (OSError, ValueError, ImportError, AttributeError, KeyError) as error:
            raise ModelError(
                f"tokenizer {path!r}: no tokenizer.json there, and transformers cannot make one: "
                f"{_in_one_line(error)}"
            ) from error
    return make_tokenizer(content, eos_token or fast.eos_token, path)


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def save_pretrained(tokenizer: Tokenizer, folder: str, *, model_max_length: int) -> None:
    """Write a local folder that `AutoTokenizer.from_pretrained` reads; the same bytes each time."""
    has_padding = tokenizer.backend.token_to_id(PAD_TOKEN) is not None
    padding = PAD_TOKEN if has_padding else tokenizer.eos_token
    special = {"eos_token": tokenizer.eos_token, "pad_token": padding}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model_max_length,
        "clean_up_tokenization_spaces": False,
        **special,
    }
    files = {
        "tokenizer.json": tokenizer.json,
        "tokenizer_config.json": canonical_json(config),
        "special_tokens_map.json": canonical_json(special),
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (Path(folder) / name).write_bytes(content)
