import json
import shutil

import pyarrow as pa
import pytest
from mixing_world import prepare, put_text_selection, source_task, write_rows, write_tokenizer

from stillhouse.errors import InputError
from stillhouse.mixing.spec import MixSpec
from stillhouse.pipelines.mix_data import list_sources, open_sources
from stillhouse.storage.artifact import Store
from stillhouse.storage.parquet import read_table


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("words"))


def prepared(words, folder, uri, **changes):
    store = Store(str(folder / "store"))
    receipt = prepare(store, words, source_task("a", uri, **changes))
    tables = [read_table(store.path(part.path)) for part in receipt.parts]
    return receipt, pa.concat_tables(tables).to_pylist() if tables else []


def counts(receipt):
    return receipt.info["arms"][0]["counts"]


def test_bad_rows_are_counted_by_reason(words, tmp_path):
    rows = [
        {"input": "red", "target": "cat", "choices": ["cat", "dog"]},
        {"input": None, "target": "cat", "choices": None},
        {"input": "red", "target": " ", "choices": None},
        {"input": "red", "target": None, "choices": ["cat"]},
        {"input": "red", "target": "sun", "choices": ["cat", "dog"]},
        {"input": "red", "target": "cat", "choices": ["cat", "cat"]},
    ]
    receipt, made = prepared(words, tmp_path, write_rows(tmp_path / "a.parquet", rows))
    assert len(made) == 1
    assert counts(receipt) == {
        "examples": 1,
        "tokens": len(made[0]["input_ids"]) + len(made[0]["target_ids"]),
        "bad: no `input`": 1,
        "bad: empty `target`": 1,
        "bad: `choices` without `target`": 1,
        "bad: `target` is none of its `choices`": 1,
        "bad: two equal `choices`": 1,
    }


def test_long_rows_are_cut_and_counted(words, tmp_path):
    rows = [{"input": "red " * 50, "target": "cat"}, {"input": "red", "target": "dog"}]
    uri = write_rows(tmp_path / "a.parquet", rows)
    receipt, made = prepared(words, tmp_path, uri, max_input=7, max_target=3)
    assert sorted(len(row["input_ids"]) for row in made)[1] == 7
    assert counts(receipt)["truncated"] == 1


def test_the_first_rows_up_to_the_cap_are_taken(words, tmp_path):
    rows = [{"input": f"red {i}", "target": "cat"} for i in range(20)]
    receipt, made = prepared(
        words, tmp_path, write_rows(tmp_path / "a.parquet", rows), max_examples=4
    )
    found = sorted(words.decode(row["input_ids"]) for row in made)
    assert found == ["red 0", "red 1", "red 2", "red 3"]
    assert counts(receipt)["over the cap"] == 16


@pytest.mark.parametrize("split_text", [True, False])
def test_text_is_cut_in_pieces_and_nothing_is_lost(words, tmp_path, split_text):
    text = " ".join(["red green blue cat"] * 30)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": text}) + "\nnot json\n")
    receipt, made = prepared(
        words, tmp_path, str(path), max_input=16, max_target=16, split_text=split_text
    )
    pieces = [words.decode(row["input_ids"] + row["target_ids"]) for row in made]
    assert sum(map(len, pieces)) == len(text)
    assert all(bool(row["input_ids"]) == split_text for row in made)
    assert any(key.startswith("bad: broken JSON") for key in counts(receipt))


def test_values_of_a_column_become_arms_and_rows_are_filtered(words, tmp_path):
    rows = [
        {"input": "red", "target": "cat", "task": task, "lang": lang}
        for task in ("b", "a")
        for lang in ("en", "de", "en")
    ]
    uri = write_rows(tmp_path / "a.parquet", rows)
    receipt, made = prepared(words, tmp_path, uri, by="task", where={"lang": "en"})
    assert [(arm["name"], arm["rows"]) for arm in receipt.info["arms"]] == [("a", 2), ("b", 2)]
    assert len(made) == 4


def test_a_selection_is_an_arm_of_its_texts(words, tmp_path):
    store = Store(str(tmp_path / "kept"))
    texts = ["red green blue cat dog", "one two three", "sun moon star sun moon star sun moon"]
    uri = put_text_selection(store, words, texts * 10, length=16)
    spec = MixSpec.model_validate(
        {
            "job": "mix",
            "target": {"path": write_rows(tmp_path / "t.parquet", [{"input": "a", "target": "b"}])},
            "auxiliary": [{"selection": uri}, {"selection": f"{tmp_path}/gone"}],
            "skip_bad_arms": True,
        }
    )
    inputs = list_sources(spec)
    assert inputs.sources[0].name == "kept" and "gone" in inputs.broken["gone"]
    opened = open_sources(store, inputs, remember=False).sources[0]
    assert opened.selection_tokenizer == (words.digest, store.path("models", "f" * 64))
    receipt, made = prepared(
        words, tmp_path, opened.uris[0], selection_folder=opened.selection_tokenizer[1]
    )
    found = [words.decode(row["input_ids"] + row["target_ids"]) for row in made]
    assert 20 <= len(found) <= counts(receipt)["examples"]  # a single token is no row
    assert set(texts) <= set(found)  # those that no sequence cuts in two
    tasks = [source_task("a", f"{at}/a", digests=("d",), selection_folder=at) for at in "xy"]
    assert tasks[0].fingerprint == tasks[1].fingerprint  # the same arm, wherever it lies
    shutil.rmtree(store.path("models"))
    with pytest.raises(InputError, match="the tokenizer of its sequences is not in its store"):
        open_sources(store, inputs, remember=False)


def test_rows_that_say_no_arm_are_counted_apart(words, tmp_path):
    rows = [{"input": "red", "target": "cat", "task": task} for task in ("a", None, "a", None)]
    uri = write_rows(tmp_path / "a.parquet", rows)
    receipt, made = prepared(words, tmp_path, uri, by="task")
    nowhere, arm = receipt.info["arms"]
    assert (nowhere["name"], nowhere["rows"]) == ("", 0)
    assert nowhere["counts"] == {"bad: no value of `task` (`by`)": 2}
    assert (arm["name"], arm["rows"], len(made)) == ("a", 2, 2)


def test_a_text_that_spells_the_end_is_not_cut_there(words, tmp_path):
    """Sequences are cut where the token EOS stands, not where a document writes its name."""
    store = Store(str(tmp_path / "kept"))
    text = f"red {words.eos_token} green"
    length = len(words.encode_batch([text])[0]) + 1  # with EOS: each sequence is one document
    uri = put_text_selection(store, words, [text, text], length=length)
    receipt, made = prepared(
        words,
        tmp_path,
        f"{store.uri}/selections/parts/kept.parquet",
        selection_folder=store.path("models", "f" * 64),
        max_input=64,
        max_target=64,
    )
    assert uri and counts(receipt)["examples"] == 2
    assert [words.decode(row["input_ids"] + row["target_ids"]) for row in made] == [text, text]


def test_a_file_that_cannot_be_read_is_told(words, tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    receipt, made = prepared(words, tmp_path, str(tmp_path / "a.parquet"))
    assert "a.parquet: cannot be read" in receipt.info["broken"] and not made
    gone, _ = prepared(words, tmp_path, str(tmp_path / "gone.parquet"))
    assert "gone.parquet" in gone.info["broken"]
