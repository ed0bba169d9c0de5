"""Rows of files as token parts: used, counted by reason or refused; encoded and cut."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mixing_world import prepare, put_text_selection, source_task, write_rows, write_tokenizer

from stillhouse.errors import InputError
from stillhouse.mixing.preparation import BadRow, Example, read_examples
from stillhouse.mixing.spec import MixSpec
from stillhouse.pipelines.mix_data import list_sources, open_sources
from stillhouse.storage.artifact import Store
from stillhouse.storage.parquet import read_table

GOOD = {"input": "red", "target": "cat"}
SURROGATE = "invalid Unicode (lone surrogate)"
NO_LIST = "`choices` is not a list of strings"
NO_VALUE = "no value of `task` (`by`)"


def read(path, where=None, by=None):
    return list(read_examples(str(path), where=where or {}, by=by))


def lines(path, *rows):
    data = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(data))
    return path


def table(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


def test_rows_of_json_are_used_or_their_fault_is_named(tmp_path):
    cases = [
        (GOOD, Example("red", "cat")),
        (GOOD | {"choices": []}, Example("red", "cat")),
        ({"text": "plain"}, Example("", "plain")),
        (GOOD | {"input": "x\ud800"}, SURROGATE),
        (GOOD | {"target": "\udc00"}, SURROGATE),
        ({"text": "\ud800"}, SURROGATE),
        (GOOD | {"input": 7}, "`input` is not a string but int"),
        (
            GOOD | {"target": {"text": "cat"}},
            "`target` is not a string but an object; name a key of it as `a.b`: text",
        ),
        (GOOD | {"input": None}, "no `input`"),
        ({"body": "plain"}, "no `text`"),
        (GOOD | {"target": " \n"}, "empty `target`"),
        (b'{"input": "\xff", "target": "cat"}', "invalid UTF-8"),
        (["red", "cat"], "not a JSON object but list"),
        (GOOD | {"target": None, "choices": ["cat"]}, "`choices` without `target`"),
        (GOOD | {"choices": ["cat", "x\ud800"]}, NO_LIST),
        (GOOD | {"choices": "cat"}, NO_LIST),
        (GOOD | {"choices": ["cat", 7]}, NO_LIST),
        (GOOD | {"choices": ["dog"]}, "`target` is none of its `choices`"),
        (GOOD | {"choices": ["cat", "cat"]}, "two equal `choices`"),
    ]
    path = lines(tmp_path / "a.jsonl", *(row for row, _ in cases), b'{"input": ')
    *found, last = read(path)
    said = [row if isinstance(row, Example) else row.reason for row in found]
    assert said == [expected for _, expected in cases]
    assert last.row == len(cases) and last.reason.startswith("broken JSON: ")


def test_columns_and_files_that_are_not_utf8(tmp_path):
    odd = pa.array([b"\xff", b"red"]).view(pa.string())
    path = table(tmp_path / "a.parquet", input=odd, target=["cat", "dog"])
    assert read(path) == [BadRow(0, "invalid UTF-8"), Example("red", "dog")]
    choices = pa.ListArray.from_arrays([0, 1, 2], pa.array([b"\xff", b"dog"]).view(pa.string()))
    path = table(tmp_path / "b.parquet", input=["a", "b"], target=["cat", "dog"], choices=choices)
    assert read(path) == [BadRow(0, NO_LIST), Example("b", "dog", ("dog",))]
    (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
    assert read(tmp_path / "a.txt") == [BadRow(0, "invalid UTF-8")]
    (tmp_path / "b.txt").write_bytes("café".encode("utf-16"))
    assert read(tmp_path / "b.txt") == [Example("", "café")]


def test_null_missing_nan_and_empty_are_no_group_and_a_number_is_its_digits(tmp_path):
    rows = [GOOD | {"task": task} for task in ("a", None, float("nan"), "", 7, 7.0, True)]
    found = read(lines(tmp_path / "a.jsonl", *rows, GOOD, GOOD | {"task": ["a"]}), by="task")
    assert [r.group for r in found if isinstance(r, Example)] == ["a", "7", "7", "true"]
    assert {r.row: r.reason for r in found if isinstance(r, BadRow)} == {
        **dict.fromkeys((1, 2, 3, 7), NO_VALUE),
        8: "no label in `where` or `by`: no plain value but list",
    }
    path = table(tmp_path / "a.parquet", input=["r", "s"], target=["t", "u"], task=["a", None])
    assert read(path, by="task") == [Example("r", "t", group="a"), BadRow(1, NO_VALUE)]
    path = lines(tmp_path / "b.jsonl", GOOD | {"task": None}, GOOD | {"task": "None"})
    assert len(read(path, where={"task": "None"})) == 1


def test_groups_may_be_nested_and_a_key_that_no_row_has_is_refused(tmp_path):
    rows = [GOOD | {"meta": {"task": name, "lang": "en"}} for name in ("a", "b")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    path = lines(tmp_path / "a.jsonl", *rows)
    for of in (path, tmp_path / "a.parquet"):
        found = read(of, by="meta.task", where={"meta.lang": "en"})
        assert [row.group for row in found] == ["a", "b"]
    for settings in ({"by": "task"}, {"where": {"task": "x"}}):
        with pytest.raises(InputError, match=r"a\.jsonl: no row has the key \['task'\]"):
            read(path, **settings)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def encode(tokenizer, tmp_path):
    """Runs a task over rows or a file: its info, the first arm's counts, the rows it made."""

    def run(rows, **changes):
        uri = rows if isinstance(rows, str) else write_rows(tmp_path / "rows.parquet", rows)
        store = Store(str(tmp_path / "store"))
        receipt = prepare(store, tokenizer, source_task("a", uri, **changes))
        made = [row for p in receipt.parts for row in read_table(store.path(p.path)).to_pylist()]
        return receipt.info, receipt.info["arms"][0]["counts"], made

    return run


def texts(tokenizer, rows):
    return [tokenizer.decode(row["input_ids"] + row["target_ids"]) for row in rows]


def test_long_rows_are_cut_and_the_first_ones_are_taken(tokenizer, encode):
    rows = [{"input": "red " * 50, "target": "cat"}, {"input": "red", "target": "dog"}]
    _, counts, made = encode(rows, max_input=7, max_target=3)
    assert sorted(len(row["input_ids"]) for row in made)[1] == 7
    tokens = sum(len(row["input_ids"]) + len(row["target_ids"]) for row in made)
    assert counts == {"examples": 2, "tokens": tokens, "truncated": 1}
    rows = [{"input": f"red {i}", "target": "cat"} for i in range(20)]
    _, counts, made = encode(rows, max_examples=4)
    inputs = sorted(tokenizer.decode(row["input_ids"]) for row in made)
    assert inputs == ["red 0", "red 1", "red 2", "red 3"] and counts["over the cap"] == 16


@pytest.mark.parametrize("split_text", [True, False])
def test_text_is_cut_in_pieces_and_nothing_is_lost(tokenizer, encode, tmp_path, split_text):
    text = " ".join(["red green blue cat"] * 30)
    path = lines(tmp_path / "a.jsonl", {"text": text}, b"not json")
    _, counts, made = encode(str(path), max_input=16, max_target=16, split_text=split_text)
    assert sum(map(len, texts(tokenizer, made))) == len(text)
    assert all(bool(row["input_ids"]) == split_text for row in made)
    assert any(key.startswith("bad: broken JSON") for key in counts)


def test_values_of_a_column_become_arms_and_rows_without_one_are_counted(encode):
    rows = [
        {"input": "red", "target": "cat", "task": task, "lang": lang}
        for task in ("b", "a", None)
        for lang in ("en", "de", "en")
    ]
    info, counts, made = encode(rows, by="task", where={"lang": "en"})
    found = [(arm["name"], arm["rows"]) for arm in info["arms"]]
    assert found == [("", 0), ("a", 2), ("b", 2)] and len(made) == 4
    assert counts == {f"bad: {NO_VALUE}": 2}


def test_a_selection_is_an_arm_of_its_texts(tokenizer, encode, tmp_path):
    store = Store(str(tmp_path / "kept"))
    kept = ["red green blue cat dog", "one two three", "sun moon star sun moon star sun moon"]
    uri = put_text_selection(store, tokenizer, kept * 10, length=16)
    spec = MixSpec.model_validate(
        {
            "job": "mix",
            "target": {"path": write_rows(tmp_path / "t.parquet", [GOOD])},
            "auxiliary": [{"selection": uri}, {"selection": f"{tmp_path}/gone"}],
            "skip_bad_arms": True,
        }
    )
    inputs = list_sources(spec)
    assert inputs.sources[0].name == "kept" and "gone" in inputs.broken["gone"]
    opened = open_sources(store, inputs, remember=False).sources[0]
    assert opened.tokenizer_folder == store.path("models", "f" * 64)
    _, counts, made = encode(opened.uris[0], selection_folder=opened.tokenizer_folder)
    found = texts(tokenizer, made)
    assert 20 <= len(found) <= counts["examples"]  # a single token is no row
    assert {*kept} <= {*found}  # those that no sequence cuts in two
    tasks = [source_task("a", f"{at}/a", digests=("d",), selection_folder=at) for at in "xy"]
    assert tasks[0].fingerprint == tasks[1].fingerprint  # the same arm, wherever it is stored
    shutil.rmtree(store.path("models"))
    with pytest.raises(InputError, match="the tokenizer of its sequences is not in its store"):
        open_sources(store, inputs, remember=False)


def test_sequences_are_cut_at_the_eos_token_not_where_a_text_spells_it(tokenizer, encode, tmp_path):
    store = Store(str(tmp_path / "kept"))
    text = f"red {tokenizer.eos_token} green"
    length = len(tokenizer.encode_batch([text])[0]) + 1  # with EOS: each sequence is one document
    put_text_selection(store, tokenizer, [text, text], length=length)
    _, counts, made = encode(
        f"{store.uri}/selections/parts/kept.parquet",
        selection_folder=store.path("models", "f" * 64),
        max_input=64,
        max_target=64,
    )
    assert counts["examples"] == 2 and texts(tokenizer, made) == [text, text]


def test_a_file_that_cannot_be_read_is_reported(encode, tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    info, _, made = encode(str(tmp_path / "a.parquet"))
    assert "a.parquet: cannot be read" in info["broken"] and not made
    info, _, _ = encode(str(tmp_path / "gone.parquet"))
    assert "gone.parquet" in info["broken"]
