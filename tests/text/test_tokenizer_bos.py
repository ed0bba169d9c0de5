"""BOS, the identity of a vocabulary, and text that a tokenizer loses."""

import json
import pickle
from collections import Counter
from pathlib import Path

import pytest
from masked_parts import CLS_ID, MASK_ID, SPECIAL, put_bert_tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from stillhouse.errors import ModelError
from stillhouse.text.documents import Document
from stillhouse.text.tasks import _tokenised
from stillhouse.text.tokenizer import (
    load_tokenizer,
    load_vocabulary,
    make_tokenizer,
    save_pretrained,
    train_tokenizer,
)

TRAINED = train_tokenizer(["the ship sails to the harbour"] * 9, vocab_size=280)
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}


def backend() -> Backend:
    made = Backend.from_str(TRAINED.decode())
    made.add_special_tokens(["<bos>"])
    return made


def with_post_processor() -> Backend:
    made = backend()
    tokens = [("<bos>", made.token_to_id("<bos>"))]
    made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=tokens)
    return made


def put(folder: Path, made: Backend, **config: object) -> str:
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(FAST | config))
    return str(folder)


CASES = {
    "post-processor": (with_post_processor, {"bos_token": "<bos>"}, True),
    "post-processor alone": (with_post_processor, {}, True),
    "named, not put": (backend, {"bos_token": "<bos>"}, False),
    "by its configuration": (backend, {"bos_token": "<bos>", "add_bos_token": True}, True),
    "not by its configuration": (backend, {"bos_token": "<bos>", "add_bos_token": False}, False),
    "Gemma's class": (backend, {"bos_token": "<bos>", "tokenizer_class": "GemmaTokenizer"}, True),
    "a class without BOS": (backend, {"tokenizer_class": "LlamaTokenizerFast"}, False),
    "none": (backend, {}, False),
}


@pytest.mark.parametrize("name", CASES)
def test_whether_models_read_behind_bos(name: str, tmp_path: Path) -> None:
    make, config, adds = CASES[name]
    folder = put(tmp_path / "a", make(), **config)
    made = load_tokenizer(folder, "<|endoftext|>")
    bos = make().token_to_id("<bos>")
    assert made.bos_id("auto") == (bos if adds else None)
    assert made.bos_id(False) is None
    assert pickle.loads(pickle.dumps(made)).bos_id("auto") == made.bos_id("auto")
    assert bos not in made.encode_batch(["the ship"])[0], "stored tokens have none"
    save_pretrained(made, str(tmp_path / "b"), model_max_length=9)
    assert load_tokenizer(str(tmp_path / "b")).bos_id("auto") == made.bos_id("auto")
    if make is with_post_processor:
        assert AutoTokenizer.from_pretrained(tmp_path / "b")("ship").input_ids[0] == bos


def test_bos_on_request(tmp_path: Path) -> None:
    folder = put(tmp_path, backend(), bos_token="<bos>")
    assert load_tokenizer(folder).bos_id(True) == backend().token_to_id("<bos>")
    with pytest.raises(ModelError, match=r"`tokenizer.bos: true`"):
        make_tokenizer(TRAINED, None).bos_id(True)


def test_a_list_of_one_eos_is_that_one(tmp_path: Path) -> None:
    folder = put(tmp_path, backend(), eos_token=["<bos>"])
    assert load_tokenizer(folder).eos_token == "<bos>"
    put(tmp_path, backend(), eos_token=["<bos>", "<|pad|>"])
    with pytest.raises(ModelError, match=r"`eos_token` is a list of several tokens"):
        load_tokenizer(folder)
    assert load_tokenizer(folder, "<|pad|>").eos_token == "<|pad|>"


def test_a_vocabulary_is_its_pieces_and_merges(tmp_path: Path) -> None:
    """Not its post-processor or added tokens, nor how merges are spelt in the file."""
    own = make_tokenizer(TRAINED, None).vocabulary
    assert load_vocabulary(put(tmp_path / "a", with_post_processor())) == own
    old = json.loads(TRAINED)
    old["model"]["merges"] = [" ".join(pair) for pair in old["model"]["merges"]]
    (tmp_path / "a" / "tokenizer.json").write_text(json.dumps(old))
    assert load_vocabulary(str(tmp_path / "a")) == own
    other = train_tokenizer(["a gull over the anchor and the tide"] * 9, vocab_size=280)
    assert make_tokenizer(other, None).vocabulary != own


def test_a_folder_of_sentencepiece_alone_says_so(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    for path in (tmp_path, tmp_path / "tokenizer.model"):
        with pytest.raises(ModelError, match=r"SentencePiece model \(install `sentencepiece`"):
            load_tokenizer(str(path))


def lost(made: Backend, *texts: str) -> dict[str, int]:
    counts: Counter[str] = Counter()
    tokenizer = make_tokenizer(made.to_str().encode(), None)
    documents = [
        Document(id=str(i), text=t, source="s", file=0, row=i) for i, t in enumerate(texts)
    ]
    list(_tokenised(tokenizer, documents, counts))
    return dict(counts)


def test_text_that_is_lost_is_counted() -> None:
    assert lost(backend(), "The Ship", "é") == {}, "bytes lose nothing"
    lower = backend()
    lower.normalizer = normalizers.Lowercase()
    assert lost(lower, "The Ship", "the ship") == {"sampled_documents": 2, "changed_documents": 1}
    bare = backend()
    bare.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    assert lost(bare, "é", "e", "ê")["changed_documents"] == 2
    words = Backend(models.WordLevel({"[UNK]": 0, "</s>": 1, "ship": 2}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    found = lost(words, "ship ahoy ahoy", "ship ship")
    assert found == {"unknown_tokens": 2, "sampled_documents": 2, "changed_documents": 1}


@pytest.mark.parametrize("declares", [True, False])
def test_tokenizers_of_masked_models(tmp_path: Path, declares: bool) -> None:
    """CLS before a sequence, the separator behind a document; saved, they are the same to all."""
    put_bert_tokenizer(tmp_path / "a", ["the", "ship"], declares=declares)
    words = load_tokenizer(str(tmp_path / "a"))
    assert (words.bos_id("auto"), words.mask_id, words.eos_token) == (CLS_ID, MASK_ID, "[SEP]")
    save_pretrained(pickle.loads(pickle.dumps(words)), str(tmp_path / "b"), model_max_length=9)
    again, fast = load_tokenizer(str(tmp_path / "b")), AutoTokenizer.from_pretrained(tmp_path / "b")
    assert again.masking == words.masking and again.digest == words.digest
    assert again.bos_id("auto") == CLS_ID
    assert fast.decode(fast("the ship")["input_ids"]) == "[CLS] the ship [SEP]"
    for name in ("pad_token", "cls_token", "sep_token", "mask_token"):
        assert getattr(fast, name) == SPECIAL[name]
    put_bert_tokenizer(tmp_path / "c", ["the", "ship"], masks=False, declares=declares)
    assert load_tokenizer(str(tmp_path / "c"), "[SEP]").mask_id is None
