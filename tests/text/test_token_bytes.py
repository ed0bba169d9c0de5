"""Bytes of tokens against the text that they were made of."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from stillhouse.text.token_bytes import token_bytes
from stillhouse.text.tokenizer import make_tokenizer, train_tokenizer

TEXTS = ["the sea, the sea", "naïve café\n\n\ttabs", "漢字 and 🙂 emoji", "", "x  y   z"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_byte_level_text_is_as_long_as_its_tokens(text):
    tokenizer = make_tokenizer(train_tokenizer(["the sea and the café"] * 5, vocab_size=280), None)
    [ids] = tokenizer.encode_batch([text])
    assert token_bytes(tokenizer)[ids].sum() == len(text.encode())


def test_special_tokens_have_no_text():
    tokenizer = make_tokenizer(train_tokenizer(["a b"], vocab_size=260), None)
    counts = token_bytes(tokenizer)
    assert counts[:2].tolist() == [0, 0] and tokenizer.eos_id == 0
    assert len(counts) == tokenizer.vocab_size


def test_pieces_with_marked_spaces_and_single_bytes():
    pieces = {"<unk>": 0, "</s>": 1, "▁the": 2, "▁": 3, "sea": 4, "é": 5, "<0xE6>": 6, "##s": 7}
    backend = Tokenizer(models.BPE(vocab=pieces, merges=[], unk_token="<unk>"))
    backend.add_special_tokens(["<unk>", "</s>"])
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = make_tokenizer(backend.to_str().encode(), "</s>")
    assert token_bytes(tokenizer).tolist() == [0, 0, 4, 1, 3, 2, 1, 1]
