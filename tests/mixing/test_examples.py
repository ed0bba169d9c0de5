"""Rows of tasks with bad text, null groups, odd types and files: used, counted or refused."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillhouse.errors import InputError
from stillhouse.mixing.examples import BadRow, Example, read_examples


def read(path, where=None, by=None):
    return list(read_examples(str(path), where=where or {}, by=by))


def lines(path, *rows):
    data = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(data))
    return path


def table(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


GOOD = {"input": "red", "target": "cat"}


def test_text_that_cannot_be_used(tmp_path):
    path = lines(
        tmp_path / "a.jsonl",
        GOOD,
        GOOD | {"input": "x\ud800"},
        GOOD | {"target": "\udc00"},
        GOOD | {"input": 7},
        GOOD | {"target": {"text": "cat"}},
        GOOD | {"input": None},
        GOOD | {"target": " \n"},
        b'{"input": "\xff", "target": "cat"}',
        b'{"input": ',
        ["red", "cat"],
        {"text": "\ud800"},
        {"text": "plain"},
        {"body": "plain"},
        GOOD | {"choices": ["cat", "x\ud800"]},
        GOOD | {"choices": "cat"},
        GOOD | {"choices": ["dog"]},
        GOOD | {"choices": ["cat", "cat"]},
        GOOD | {"choices": ["cat", 7]},
        GOOD | {"choices": []},
    )
    found = read(path)
    assert [row for row in found if isinstance(row, Example)] == [
        Example("red", "cat"),
        Example("", "plain"),
        Example("red", "cat"),
    ]
    reasons = {row.row: row.reason for row in found if isinstance(row, BadRow)}
    assert reasons.pop(8).startswith("broken JSON: ")
    surrogate = "invalid Unicode (lone surrogate)"
    assert reasons == {
        1: surrogate,
        2: surrogate,
        3: "`input` is not a string but int",
        4: "`target` is not a string but an object; name a key of it as `a.b`: text",
        5: "no `input`",
        6: "empty `target`",
        7: "invalid UTF-8",
        9: "not a JSON object but list",
        10: surrogate,
        12: "no `text`",
        13: "`choices` is not a list of strings",
        14: "`choices` is not a list of strings",
        15: "`target` is none of its `choices`",
        16: "two equal `choices`",
        17: "`choices` is not a list of strings",
    }


def test_columns_that_are_not_utf8(tmp_path):
    odd = pa.array([b"\xff", b"red"]).view(pa.string())
    path = table(tmp_path / "a.parquet", input=odd, target=["cat", "dog"])
    assert read(path) == [BadRow(0, "invalid UTF-8"), Example("red", "dog")]
    choices = pa.ListArray.from_arrays([0, 1, 2], pa.array([b"\xff", b"dog"]).view(pa.string()))
    path = table(tmp_path / "b.parquet", input=["a", "b"], target=["cat", "dog"], choices=choices)
    assert read(path) == [
        BadRow(0, "`choices` is not a list of strings"),
        Example("b", "dog", ("dog",)),
    ]


NO_VALUE = "no value of `task` (`by`)"


def test_rows_without_a_group(tmp_path):
    """Null, missing, NaN and empty are no arm; a number is one by its digits."""
    rows = [GOOD | {"task": task} for task in ("a", None, float("nan"), "", 7, 7.0, True)]
    path = lines(tmp_path / "a.jsonl", *rows, GOOD, GOOD | {"task": ["a"]})
    found = read(path, by="task")
    assert [r.group for r in found if isinstance(r, Example)] == ["a", "7", "7", "true"]
    assert {r.row: r.reason for r in found if isinstance(r, BadRow)} == {
        1: NO_VALUE,
        2: NO_VALUE,
        3: NO_VALUE,
        7: NO_VALUE,
        8: "no label in `where` or `by`: no plain value but list",
    }
    path = table(tmp_path / "a.parquet", input=["r", "s"], target=["t", "u"], task=["a", None])
    assert read(path, by="task") == [Example("r", "t", group="a"), BadRow(1, NO_VALUE)]


def test_null_is_not_the_word_none(tmp_path):
    path = lines(tmp_path / "a.jsonl", GOOD | {"task": None}, GOOD | {"task": "None"})
    assert len(read(path, where={"task": "None"})) == 1


def test_nested_groups(tmp_path):
    rows = [GOOD | {"meta": {"task": name, "lang": "en"}} for name in ("a", "b")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for path in (lines(tmp_path / "a.jsonl", *rows), tmp_path / "a.parquet"):
        found = read(path, by="meta.task", where={"meta.lang": "en"})
        assert [row.group for row in found] == ["a", "b"]


def test_a_key_that_no_row_has(tmp_path):
    path = lines(tmp_path / "a.jsonl", GOOD, GOOD)
    for settings in ({"by": "task"}, {"where": {"task": "x"}}):
        with pytest.raises(InputError, match=r"a\.jsonl: no row has the key \['task'\]"):
            read(path, **settings)


def test_text_files(tmp_path):
    (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
    assert read(tmp_path / "a.txt") == [BadRow(0, "invalid UTF-8")]
    (tmp_path / "b.txt").write_bytes("café".encode("utf-16"))
    assert read(tmp_path / "b.txt") == [Example("", "café")]
