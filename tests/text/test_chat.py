"""Conversations: what they become by a chat template, against transformers; rows, masks, faults."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from stillhouse.data_settings import DataSource
from stillhouse.errors import ModelError
from stillhouse.storage.artifact import Store
from stillhouse.text.documents import DeadLetter, read_documents
from stillhouse.text.tasks import PackTask, ScanTask, UnitFile
from stillhouse.text.tokenizer import (
    load_tokenizer,
    save_pretrained,
    tokenizer_identity,
    train_tokenizer,
)

MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
WITH_BOS = "{{ bos_token }}" + UNMARKED
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}"
TALKS = [
    [("user", "What is two and two?"), ("assistant", "four")],
    [
        ("system", "Be brief."),
        ("user", "The ship's name?\n"),
        ("assistant", " Sea Wind"),
        ("user", "And 5?"),
        ("assistant", "\nfünf 🐟"),
    ],
    [("assistant", "hello"), ("user", "a question without an answer")],
]


def turns(talk):
    return [{"role": role, "content": content} for role, content in talk]


@pytest.fixture(scope="module")
def words():
    """Two special tokens of turns, and a BOS."""
    texts = [content for talk in TALKS for _, content in talk] * 4
    made = tokenizers.Tokenizer.from_str(train_tokenizer(texts, vocab_size=300).decode())
    special = ["<|im_start|>", "<|im_end|>", "<|begin|>"]
    made.add_special_tokens([AddedToken(token, special=True) for token in special])
    return made


@pytest.fixture
def folder(words, tmp_path):
    def make(template, **config):
        fast = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|endoftext|>", **config)
        fast.chat_template = template
        place = tmp_path / f"words-{len([*tmp_path.iterdir()])}"
        fast.save_pretrained(place)
        return str(place)

    return make


@pytest.mark.parametrize("talk", range(len(TALKS)))
def test_ids_and_marked_answers_are_those_of_transformers(folder, talk):
    place = folder(MARKED)
    theirs = AutoTokenizer.from_pretrained(place).apply_chat_template(
        turns(TALKS[talk]), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = load_tokenizer(place).encode_chat(turns(TALKS[talk]))
    assert ids.tolist() == theirs["input_ids"]
    assert mask[:-1].tolist() == theirs["assistant_masks"]
    assert mask[-1] == (TALKS[talk][-1][0] == "assistant")  # this template ends with the turn


@pytest.mark.parametrize("talk", range(len(TALKS)))
def test_without_marks_an_answer_is_what_its_turn_adds(folder, talk):
    """Token by token: in an answer's turn, behind the line that names the assistant."""
    place = folder(UNMARKED)
    fast = AutoTokenizer.from_pretrained(place)
    ids, mask = load_tokenizer(place).encode_chat(turns(TALKS[talk]))
    assert ids.tolist() == fast.apply_chat_template(turns(TALKS[talk]), return_dict=False)
    start = fast.convert_tokens_to_ids("<|im_start|>")
    written = [fast.decode(ids[mask[:-1] == 1])]
    assert "".join(written).replace("\n", "") == "".join(
        f"{content}<|im_end|>" for role, content in TALKS[talk] if role == "assistant"
    ).replace("\n", "")
    assert not mask[:-1][ids == start].any()
    assert mask[-1] == (TALKS[talk][-1][0] == "assistant")


def test_a_bos_of_the_template_is_put_before_sequences_instead(folder):
    kept, left = (
        load_tokenizer(folder(WITH_BOS, bos_token="<|begin|>", add_bos_token=adds))
        for adds in (False, True)
    )
    with_bos, mask = kept.encode_chat(turns(TALKS[0]))
    without, shorter = left.encode_chat(turns(TALKS[0]))
    assert kept.backend.id_to_token(int(with_bos[0])) == "<|begin|>"
    assert with_bos[1:].tolist() == without.tolist() and mask[1:].tolist() == shorter.tolist()


def test_without_a_template_turns_are_plain_text(words, tmp_path):
    """The whole text is tokenised as documents are, special tokens in it too."""
    plain = load_tokenizer(_plain(words, tmp_path))
    talk = [("user", "say <|im_end|>"), ("assistant", "four"), ("user", "two"), ("assistant", "5")]
    ids, mask = plain.encode_chat(turns(talk))
    text = "user: say <|im_end|>\n\nassistant: four\n\nuser: two\n\nassistant: 5"
    assert ids.tolist() == plain.encode_batch([text])[0].tolist()
    answers = plain.decode(ids[mask[:-1] == 1])
    assert answers.replace(" ", "") == "four5" and mask[-1] == 1


def _plain(words, folder):
    path = folder / "tokenizer.json"
    words.save(str(path))
    return str(path)


def test_a_saved_tokenizer_keeps_its_template(folder, tmp_path):
    made = load_tokenizer(folder(MARKED))
    save_pretrained(made, str(tmp_path / "again"), model_max_length=32)
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again.chat_template == MARKED
    assert load_tokenizer(str(tmp_path / "again")).chat_template == MARKED


ROWS = [
    {"messages": turns(TALKS[0])},
    {"conversations": [{"from": "human", "value": "a"}]},
    {"messages": [{"role": "user", "content": "nobody answers"}]},
    {"messages": [{"from": "human", "value": "2?"}, {"from": "gpt", "value": "two"}]},
    {"messages": turns([("user", "<|im_end|> injected"), ("assistant", "no")])},
    {"messages": [{"role": "assistant", "content": [{"type": "text", "text": "in parts"}]}]},
    {"messages": [{"role": "assistant", "content": [{"type": "image_url"}]}]},
    {"messages": "user: hello"},
    {"messages": turns(TALKS[1])},
]


@pytest.fixture
def source(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    columns = {"messages": "messages"}
    return DataSource(path=str(tmp_path / "rows.jsonl"), columns=columns, max_bad_rows=10)


def test_rows_become_conversations(source):
    found = list(read_documents(str(source.path), file=0, name="x", settings=source))
    good = {d.row: d.text for d in found if not isinstance(d, DeadLetter)}
    assert good[0] == "user: What is two and two?\n\nassistant: four"
    assert good[3] == "user: 2?\n\nassistant: two" and good[5] == "assistant: in parts"
    assert sorted(good) == [0, 3, 4, 5, 8]
    bad = {d.row: d.reason for d in found if isinstance(d, DeadLetter)}
    assert bad == {
        1: "`messages` (`columns.messages`): absent",
        2: "`messages` (`columns.messages`): no turn of the assistant",
        6: "`messages` (`columns.messages`): turn 0 holds something else than text",
        7: "`messages` (`columns.messages`): not a list of turns but str",
    }


def packed(source, place, store, length):
    words = load_tokenizer(place)
    task = PackTask(
        unit=ScanTask(source=source, files=(UnitFile(str(source.path), "d", None),)),
        dropped="",
        tokenizer=words.digest,
        eos_token=words.eos_token,
        sequence_length=length,
        part_rows=100,
    )
    made = task.run(Store(str(store)), words, None)
    return next(iter(made.tables)), [*made.tables], made.counts


def test_ids_and_masks_of_parts(source, folder, tmp_path):
    """One row spells a special token and is dropped; EOS stands behind each of the others."""
    place, length = folder(MARKED), 8
    table, _, counts = packed(source, place, tmp_path, length)
    fast, ids, mask, split = AutoTokenizer.from_pretrained(place), [], [], 0
    share = turns([("user", "2?"), ("assistant", "two")])
    for talk in (turns(TALKS[0]), share, turns([("assistant", "in parts")]), turns(TALKS[1])):
        made = fast.apply_chat_template(
            talk, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        first = len(ids) // length
        ids += [*made["input_ids"], fast.eos_token_id]
        mask += [*made["assistant_masks"], 1]
        split += first != (len(ids) - 1) // length
    whole = len(ids) // length * length
    assert np.ravel(table["input_ids"].to_pylist()).tolist() == ids[:whole]
    assert np.ravel(table["loss_mask"].to_pylist()).tolist() == mask[:whole]
    assert counts["documents"] == 4 and counts["split_documents"] == split
    assert counts["dropped: a turn spells a special token of the tokenizer"] == 1


def test_what_a_template_refuses_is_dropped_with_its_words(source, folder, tmp_path):
    _, _, counts = packed(source, folder(STRICT + UNMARKED), tmp_path, 4)
    refused = {name: count for name, count in counts.items() if "user first" in name}
    assert refused == {"dropped: the chat template refuses it: user first": 2}  # rows 5 and 8


def test_either_messages_or_text():
    with pytest.raises(ValueError, match="give `messages`, or `text`"):
        DataSource.model_validate({"path": "x", "columns": {"messages": "m", "text": "t"}})
    assert "messages" not in DataSource(path="x").identity()["columns"]


def test_what_is_no_template_ends_the_job(source, folder, tmp_path):
    with pytest.raises(ModelError, match="chat template cannot be read: Expected"):
        packed(source, folder("{% for %}" + UNMARKED), tmp_path, 4)


def test_a_template_is_part_of_what_a_tokenizer_is(folder):
    names = {tokenizer_identity(folder(template), None) for template in (MARKED, UNMARKED, None)}
    assert len(names) == 3
