import json
import pickle
from hashlib import sha256

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers
from transformers import AutoTokenizer

from stillhouse.errors import ModelError
from stillhouse.text.tokenizer import (
    in_sample,
    load_tokenizer,
    make_tokenizer,
    save_pretrained,
    train_tokenizer,
)

TEXTS = ["the cat sat on the mat, the end", "a cat and a hat", "naïve café 日本語 🙂"] * 5
TRAINED = train_tokenizer(TEXTS, vocab_size=290)
TOKENIZER = make_tokenizer(TRAINED, None)


def test_training_is_deterministic_and_lays_out_the_vocabulary():
    assert train_tokenizer(iter(TEXTS), vocab_size=290) == TRAINED
    assert (TOKENIZER.eos_token, TOKENIZER.eos_id, TOKENIZER.vocab_size) == (
        "<|endoftext|>",
        0,
        290,
    )
    assert TOKENIZER.backend.token_to_id("<|pad|>") == 1
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= set(TOKENIZER.backend.get_vocab())
    assert TOKENIZER.digest == sha256(TRAINED).hexdigest()
    (ids,) = TOKENIZER.encode_batch(["the cat"])
    assert (ids.dtype, len(ids)) == (np.uint32, 2)
    backend = tokenizers.Tokenizer.from_str(TRAINED.decode())
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    limited = make_tokenizer(backend.to_str().encode(), None)
    text = "dogs dig deep holes"
    assert limited.encode_batch([text])[0].tolist() == TOKENIZER.encode_batch([text])[0].tolist()


@given(st.text())
def test_decoding_gives_the_text_back(text):
    (ids,) = TOKENIZER.encode_batch([text])
    assert TOKENIZER.decode(ids) == text


def test_text_that_spells_a_special_token_is_only_text_also_after_pickling():
    for tokenizer in (TOKENIZER, pickle.loads(pickle.dumps(TOKENIZER))):
        (ids,) = tokenizer.encode_batch(["a <|endoftext|> b"])
        assert tokenizer.eos_id not in ids
        assert tokenizer.decode(ids) == "a <|endoftext|> b"


def test_saved_folder_is_read_by_transformers_and_by_us(tmp_path):
    folder = tmp_path / "tokenizer"
    save_pretrained(TOKENIZER, str(folder), model_max_length=64)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs("the cat sat")["input_ids"] == TOKENIZER.encode_batch(["the cat sat"])[0].tolist()
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.model_max_length) == (0, 1, 64)
    assert theirs.decode(theirs("naïve , ok")["input_ids"]) == "naïve , ok"
    assert load_tokenizer(str(folder)).digest == TOKENIZER.digest
    assert load_tokenizer(str(folder / "tokenizer.json")).digest == TOKENIZER.digest
    assert load_tokenizer(f"file://{folder}").digest == TOKENIZER.digest


def test_a_folder_of_vocabulary_and_merges_is_converted(tmp_path):
    backend = tokenizers.Tokenizer.from_str(TRAINED.decode())
    backend.model.save(str(tmp_path))
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    converted = load_tokenizer(str(tmp_path))
    assert converted.eos_id == 0
    assert (
        converted.encode_batch(["the cat"])[0].tolist()
        == TOKENIZER.encode_batch(["the cat"])[0].tolist()
    )


def test_eos_is_the_given_then_the_declared_then_a_common_one(tmp_path):
    backend = tokenizers.Tokenizer.from_str(TRAINED.decode())
    backend.add_special_tokens(["</s>", "<stop>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path)).eos_token == "<|endoftext|>"
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "</s>"}}')
    assert load_tokenizer(str(tmp_path)).eos_token == "</s>"
    assert load_tokenizer(str(tmp_path)).eos_id == 290
    assert load_tokenizer(str(tmp_path), "<stop>").eos_id == 291
    with pytest.raises(ModelError, match=r"no end-of-document token <no> .* `tokenizer.eos_token`"):
        load_tokenizer(str(tmp_path), "<no>")


def test_vocab_size_covers_gaps_in_the_ids():
    model = models.WordLevel({"a": 0, "</s>": 9}, unk_token="a")
    gaps = make_tokenizer(tokenizers.Tokenizer(model).to_str().encode(), None)
    assert (gaps.vocab_size, gaps.eos_id) == (10, 9)
    nothing = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(ModelError, match=r"set `tokenizer.eos_token`"):
        make_tokenizer(nothing.to_str().encode(), None)


@pytest.mark.parametrize("content", ["{", "[1]", "{}", '"text"'])
def test_a_broken_file_is_one_line(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=r"is not a tokenizer.json") as error:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value)


def test_nothing_there(tmp_path):
    for path in (tmp_path / "no", tmp_path / "no.json"):
        with pytest.raises(ModelError, match=r"no such file .*`tokenizer.path`"):
            load_tokenizer(str(path))
    (tmp_path / "other.txt").write_text("x")
    with pytest.raises(ModelError, match=r"no tokenizer\.json there"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ModelError, match="neither a file or folder here"):
        load_tokenizer("not a/hub/name")


def test_the_sample_is_a_share_of_all_and_grows_with_it():
    hashes = [sha256(str(i).encode()).digest() for i in range(10_000)]
    tenth = [h for h in hashes if in_sample(h, 0.1)]
    assert 900 < len(tenth) < 1100
    assert all(in_sample(h, 0.2) for h in tenth)
    assert all(in_sample(h, 1.0) for h in hashes)
    assert not any(in_sample(h, 0.0) for h in hashes)
