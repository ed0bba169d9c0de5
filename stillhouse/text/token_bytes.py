"""How many bytes of text each token of a vocabulary stands for."""

import re

import numpy as np
from numpy.typing import NDArray

from stillhouse.text.tokenizer import Tokenizer

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_JOINED = "##"


def token_bytes(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Bytes of UTF-8 by id [V]; 0 for special tokens and ids without a piece.

    Exact for byte-level vocabularies. In others a space is one byte where a piece marks it, also
    the one that the tokenizer puts before a text.
    """
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    backend = tokenizer.backend
    byte_level = "ByteLevel" in str(backend.decoder)
    for piece, index in backend.get_vocab(with_added_tokens=False).items():
        if byte_level:
            counts[index] = len(piece)  # a character stands for each byte
        elif _BYTE.fullmatch(piece):
            counts[index] = 1
        else:
            text = piece.replace(_SPACE, " ").removeprefix(_JOINED)
            counts[index] = len(text.encode())
    for index, token in backend.get_added_tokens_decoder().items():
        counts[index] = 0 if token.special else len(token.content.encode())
    counts[tokenizer.eos_id] = 0
    return counts
