"""Rows of prompt and answer: reading, packing, and the loss mask."""

import json

import numpy as np
import pytest

from stillhouse.data_settings import DataSource
from stillhouse.storage.artifact import Store
from stillhouse.text.documents import DeadLetter, read_documents
from stillhouse.text.packing import Packer, tokens_table
from stillhouse.text.tasks import PackTask, ScanTask, UnitFile
from stillhouse.text.tokenizer import make_tokenizer, train_tokenizer

ROWS = [
    {"prompt": "two and two is ", "completion": "four"},
    {"prompt": "", "completion": "a text of its own"},
    {"completion": "lost"},
    {"prompt": "the ship ", "completion": "sails"},
]


@pytest.fixture
def source(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    columns = {"prompt": "prompt", "text": "completion"}
    return DataSource(path=str(tmp_path / "rows.jsonl"), columns=columns, max_bad_rows=10)


def test_rows_become_documents_with_a_prompt(source):
    found = list(read_documents(str(source.path), file=0, name="x", settings=source))
    assert [(d.text, d.prompt_chars) for d in found if not isinstance(d, DeadLetter)] == [
        ("two and two is four", 15),
        ("a text of its own", 0),
        ("the ship sails", 9),
    ]
    [bad] = [d for d in found if isinstance(d, DeadLetter)]
    assert (bad.row, bad.reason) == (2, "no `prompt` (`columns.prompt`)")


def test_the_mask_lies_beside_the_tokens(source, tmp_path):
    """It marks the answer and the EOS after it; prompt and answer are tokenised separately."""
    words = make_tokenizer(
        train_tokenizer([r["completion"] for r in ROWS] * 3, vocab_size=270), None
    )
    unit = ScanTask(source=source, files=(UnitFile(str(source.path), "d", None),))
    task = PackTask(
        unit=unit,
        dropped="",
        tokenizer=words.digest,
        eos_token=words.eos_token,
        sequence_length=4,
        part_rows=100,
    )
    store = Store(str(tmp_path / "store"))
    [table] = task.run(store, words, None).tables
    ids, mask = [], []
    for row in (ROWS[0], ROWS[1], ROWS[3]):
        prompt, answer = words.encode_batch([row["prompt"], row["completion"]])
        ids += [*prompt, *answer, words.eos_id]
        mask += [0] * len(prompt) + [1] * (len(answer) + 1)
    count = len(ids) // 4 * 4
    assert np.ravel(table["input_ids"].to_pylist()).tolist() == ids[:count]
    assert np.ravel(table["loss_mask"].to_pylist()).tolist() == mask[:count]


def test_without_prompts_there_is_no_mask():
    packer = Packer(sequence_length=2, eos_id=0, dtype=np.uint16, part_rows=10)
    assert tokens_table(packer.finish()).column_names == ["input_ids", "documents"]
    assert "prompt" not in DataSource(path="x").identity()["columns"]
