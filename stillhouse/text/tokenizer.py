"""Tokenizers: a byte-level BPE trained on a sample of the pool, or an existing one.

A tokenizer consists of its `tokenizer.json` and the token between documents (EOS). Special tokens
in a text are not recognised: "<|endoftext|>" inside a document becomes ordinary tokens. Stored
tokens have no beginning-of-sequence token (BOS); it is put before a sequence where a model reads it
(`bos_id`).
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, trainers

from stillhouse.errors import ModelError
from stillhouse.fingerprint import canonical_json, fingerprint, sha256
from stillhouse.storage.filesystem import absolute_uri, join, list_names, read_bytes
from stillhouse.text.chat import Messages, render
from stillhouse.text.tokenizer_files import (
    declared_tokens,
    masking_tokens,
    one_token,
    put_around,
    read_chat_template,
    usual_masking,
)

EOS_TOKEN = "<|endoftext|>"
PAD_TOKEN = "<|pad|>"
_COMMON_EOS = (EOS_TOKEN, "</s>", "<eos>", "<|end_of_text|>")
_FORMATS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_BYTES = pre_tokenizers.ByteLevel.alphabet()
BosSetting = Literal["auto"] | bool


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Equal where pieces, ids and merges are.

    Attributes:
        digest: fingerprint of these, without added tokens.
        size: largest id plus one, with added tokens.
    """

    digest: str
    size: int = field(compare=False)


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A loaded tokenizer; it can be pickled.

    Attributes:
        json: canonical `tokenizer.json`.
        eos_token, eos_id: the token between documents.
        vocab_size: largest id plus one: rows of the embedding matrix.
        digest: hex SHA-256 of `json`.
        backend: the `tokenizers` object.
        bos_token: the beginning-of-sequence token, if known.
        adds_bos: models of this tokenizer read sequences that begin with it.
        chat_template: Jinja; None if it has none.
        special_tokens: that no turn of a conversation may spell.
        masking: special tokens by name, with `mask_token`, or none; a separator is the default EOS.
    """

    json: bytes
    eos_token: str
    eos_id: int
    vocab_size: int
    digest: str
    backend: tokenizers.Tokenizer
    bos_token: str | None = None
    adds_bos: bool = False
    chat_template: str | None = None
    special_tokens: tuple[str, ...] = ()
    masking: tuple[tuple[str, str], ...] = ()

    @property
    def vocabulary(self) -> Vocabulary:
        return _vocabulary(self.backend)

    def bos_id(self, asked: BosSetting) -> int | None:
        """The id before every sequence by the setting `tokenizer.bos`, or None.

        Raises:
            ModelError: one is asked for, and none is known.
        """
        if asked is False or (asked == "auto" and not self.adds_bos):
            return None
        bos_id = None if self.bos_token is None else self.backend.token_to_id(self.bos_token)
        if bos_id is None:
            raise ModelError(
                f"`tokenizer.bos: true`: the tokenizer names no BOS token that it has "
                f"({self.bos_token!r}): set `bos_token` in its tokenizer_config.json"
            )
        return bos_id

    @property
    def mask_id(self) -> int | None:
        """The token that hides others from masked models, if it has one."""
        return self.backend.token_to_id(dict(self.masking).get("mask_token", ""))

    @property
    def unknown_id(self) -> int | None:
        """The id of text that it has no pieces for; None if it has pieces for any text."""
        model: Any = self.backend.model
        if getattr(model, "byte_fallback", False):
            return None
        if isinstance(model, models.Unigram):
            return json.loads(self.json)["model"].get("unk_id")
        token = getattr(model, "unk_token", None)
        return None if token is None else self.backend.token_to_id(token)

    @property
    def is_exact(self) -> bool:
        """Whether `decode` gives every text back: byte-level, all bytes, no normaliser."""
        return (
            self.backend.normalizer is None
            and isinstance(self.backend.decoder, decoders.ByteLevel)
            and all(self.backend.token_to_id(c) is not None for c in _BYTES)
        )

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """The ids of each text, without special tokens; uint32 [n]."""
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def encode_chat(self, messages: Messages) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
        """A conversation by the chat template, as transformers writes it, without BOS.

        Returns:
            Its ids [n], and a mask [n + 1]: 1 for tokens that hold a character of an answer, the
            last value for an EOS behind them.

        Raises:
            ValueError: the template refuses it, or a turn spells a special token.
        """
        bos = self.bos_token or ""
        names = {"bos_token": bos, "eos_token": self.eos_token}
        rendered = render(messages, self.chat_template, names)
        if self.adds_bos:
            rendered = rendered.without_beginning(bos)
        if self.chat_template is not None:
            for token in self.special_tokens:
                if any(token in turn["content"] for turn in messages):
                    raise ValueError("a turn spells a special token of the tokenizer")
        self.backend.encode_special_tokens = self.chat_template is None
        try:
            found = self.backend.encode(rendered.text, add_special_tokens=False)
        finally:
            self.backend.encode_special_tokens = True
        ended = bool(rendered.answers) and rendered.answers[-1][1] == len(rendered.text)
        mask = np.array([*rendered.overlaps(found.offsets), ended], np.uint8)
        return np.array(found.ids, np.uint32), mask

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """The text of some ids, special tokens included."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as `json`: the backend's own pickle forgets `encode_special_tokens`."""
        rest = "the tokenizer", self.bos_token, self.adds_bos, self.chat_template, self.masking
        return make_tokenizer, (self.json, self.eos_token, *rest)


def in_sample(document_hash: bytes, share: float) -> bool:
    """Whether a document is in the tokenizer's training sample, `share` of all, by its hash."""
    digest = hashlib.blake2b(document_hash, digest_size=8, person=b"tokenizer sample").digest()
    return int.from_bytes(digest, "big") < share * 2**64


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> bytes:
    """Train a byte-level BPE; returns its canonical `tokenizer.json`. Deterministic.

    Ids 0 and 1 are `<|endoftext|>` and `<|pad|>`, then the 256 bytes, then merges. Texts with few
    pairs give fewer than `vocab_size` ids.
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
    tokenizer_json: bytes,
    eos_token: str | None,
    place: str = "the tokenizer",
    bos_token: str | None = None,
    adds_bos: bool = False,
    chat_template: str | None = None,
    masking: tuple[tuple[str, str], ...] = (),
) -> Tokenizer:
    """A tokenizer from the content of its `tokenizer.json`.

    Args:
        tokenizer_json: as written by `tokenizers` or by `train_tokenizer`.
        eos_token: the token between documents; default a common one that it has.
        place: where it came from, for errors.
        bos_token, adds_bos: of its configuration; its post-processor takes precedence.
        chat_template, masking: of its folder.

    Raises:
        ModelError: not a tokenizer, or no such token.
    """
    backend = _backend(tokenizer_json, place)
    content = canonical_json(json.loads(tokenizer_json))
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # text that spells a special token is only text
    processed, behind = put_around(backend)
    if processed and behind and not masking:
        masking = usual_masking(_special_tokens(backend), processed, behind)
    vocabulary = backend.get_vocab(with_added_tokens=True)
    usual = [dict(masking).get("sep_token"), *_COMMON_EOS]
    candidates = [token for token in usual if token] if eos_token is None else [eos_token]
    eos_token = next((token for token in candidates if token in vocabulary), None)
    if eos_token is None:
        raise ModelError(
            f"{place}: no end-of-document token {' or '.join(candidates)} in its vocabulary; set "
            "`tokenizer.eos_token`"
        )
    return Tokenizer(
        json=content,
        eos_token=eos_token,
        eos_id=vocabulary[eos_token],
        vocab_size=_size(backend),
        digest=sha256(content),
        backend=backend,
        bos_token=processed or bos_token,
        adds_bos=processed is not None or adds_bos,
        chat_template=chat_template,
        special_tokens=_special_tokens(backend),
        masking=masking,
    )


def _special_tokens(backend: tokenizers.Tokenizer) -> tuple[str, ...]:
    added = backend.get_added_tokens_decoder().values()
    return tuple(token.content for token in added if token.special)


def _backend(tokenizer_json: bytes, place: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(tokenizer_json.decode())
    except Exception as error:  # the Rust side raises plain Exception
        raise ModelError(f"{place} is not a tokenizer.json: {_in_one_line(error)}") from error


def load_tokenizer(path: str, eos_token: str | None = None) -> Tokenizer:
    """Load a tokenizer from a `tokenizer.json`, a transformers folder, or the hub.

    Args:
        path: local path or fsspec URI of the file or folder, else a name on the hub.
        eos_token: the token between documents; default that of its configuration.

    Raises:
        ModelError: it does not exist, is not a tokenizer, has no EOS; SentencePiece or another slow
            format that transformers cannot convert with the installed packages.
    """
    uri = absolute_uri(path)
    if uri.endswith(".model"):
        place, name = uri.rsplit("/", 1)
        return _convert(place, name, eos_token, path)
    folder, file_name = uri.rsplit("/", 1) if uri.endswith(".json") else (uri, "tokenizer.json")
    names = list_names(folder)
    if not names:
        if "://" in path or path.startswith((".", "/", "~")):
            raise ModelError(f"tokenizer {path!r}: no such file or folder (`tokenizer.path`)")
        return load_tokenizer(_from_hub(path), eos_token)
    if file_name in names:
        eos, bos, adds_bos, masking = declared_tokens(folder, names)
        eos_token = eos_token or one_token(eos, "eos_token", folder)
        content = read_bytes(join(folder, file_name))
        single, chat = one_token(bos, "bos_token", folder), read_chat_template(folder, names)
        return make_tokenizer(content, eos_token, path, single, adds_bos, chat, masking)
    if uri.endswith(".json"):
        raise ModelError(f"tokenizer {path!r}: no such file (`tokenizer.path`)")
    return _convert(folder, names, eos_token, path)


def load_vocabulary(folder: str) -> Vocabulary:
    """The vocabulary of the tokenizer.json in a folder, which needs no EOS.

    Raises:
        ModelError: it is not a tokenizer.
    """
    place = join(folder, "tokenizer.json")
    return _vocabulary(_backend(read_bytes(place), place))


def _vocabulary(backend: tokenizers.Tokenizer) -> Vocabulary:
    model = json.loads(backend.to_str())["model"]
    return Vocabulary(fingerprint([model.get("vocab"), model.get("merges")]), _size(backend))


def _size(backend: tokenizers.Tokenizer) -> int:
    return max(backend.get_vocab(with_added_tokens=True).values()) + 1


def has_tokenizer(folder: str) -> bool:
    """Whether the folder of a model has a tokenizer of a known format."""
    return not {*list_names(folder)}.isdisjoint(_FORMATS)


def tokenizer_identity(path: str, eos_token: str | None) -> str:
    """Fingerprint of a tokenizer with its EOS, BOS and chat template."""
    loaded = load_tokenizer(path, eos_token)
    chat = [] if loaded.chat_template is None else [loaded.chat_template]
    return fingerprint([loaded.digest, loaded.eos_token, loaded.bos_token, loaded.adds_bos, *chat])


def _from_hub(name: str) -> str:
    """Download the small files of a hub repository; returns the local folder."""
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, allow_patterns=["*.json", "*.model", "*.txt", "*.jinja"])
    except (OSError, ValueError) as error:
        raise ModelError(
            f"tokenizer {name!r} is neither a file or folder here, nor can it be had from the hub "
            f"({_in_one_line(error)}); set `tokenizer.path`"
        ) from error


def _convert(folder: str, names: list[str] | str, eos_token: str | None, path: str) -> Tokenizer:
    """Convert another format by transformers: the files of a folder, or a SentencePiece model."""
    from transformers import AutoTokenizer

    hint = ""
    if any(name.endswith(".model") for name in ([names] if isinstance(names, str) else names)):
        hint = (
            " of its SentencePiece model (install `sentencepiece` and `protobuf`, or save it once "
            "with `AutoTokenizer.from_pretrained(...).save_pretrained(...)` where they are)"
        )
    with tempfile.TemporaryDirectory() as local:
        for name in [names] if isinstance(names, str) else names:
            if name.endswith((".json", ".model", ".txt", ".jinja")):
                target = "tokenizer.model" if isinstance(names, str) else name
                (Path(local) / target).write_bytes(read_bytes(join(folder, name)))
        try:
            fast: Any = AutoTokenizer.from_pretrained(local)
            content = fast.backend_tokenizer.to_str().encode()
        except Exception as error:  # whatever its converters raise
            raise ModelError(
                f"tokenizer {path!r}: no tokenizer.json there, and transformers cannot make one"
                f"{hint}: {_in_one_line(error)}"
            ) from error
        adds_bos = declared_tokens(local, os.listdir(local))[2]
        chat = read_chat_template(local, os.listdir(local))
    eos = eos_token or one_token(fast.eos_token, "eos_token", path)
    masking = masking_tokens(fast.special_tokens_map, path)
    return make_tokenizer(content, eos, path, fast.bos_token, adds_bos, chat, masking)


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def save_pretrained(tokenizer: Tokenizer, folder: str, *, model_max_length: int) -> None:
    """Write a local folder for `AutoTokenizer.from_pretrained`, the same bytes each time."""
    has_padding = tokenizer.backend.token_to_id(PAD_TOKEN) is not None
    padding = PAD_TOKEN if has_padding else tokenizer.eos_token
    special = {"pad_token": padding, **dict(tokenizer.masking), "eos_token": tokenizer.eos_token}
    if tokenizer.adds_bos:
        special["bos_token"] = str(tokenizer.bos_token)
    # by `add_bos_token` transformers replace the post-processor, BERT's with its separator too
    declared = tokenizer.adds_bos and not (tokenizer.masking and put_around(tokenizer.backend)[0])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model_max_length,
        "clean_up_tokenization_spaces": False,
        **({"add_bos_token": True} if declared else {}),
        **({"chat_template": tokenizer.chat_template} if tokenizer.chat_template else {}),
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
