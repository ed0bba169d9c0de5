"""Columns and keys of every type: as text, as labels, by dotted path; expected values by hand."""

import datetime
import io
import json
import random
import uuid
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillhouse.data_settings import ColumnNames, DataSource
from stillhouse.errors import BadFileError, InputError
from stillhouse.text import records
from stillhouse.text.documents import DeadLetter, read_documents
from stillhouse.text.values import ABSENT, find

PLAIN = DataSource(path="unused")
DAY = datetime.date(2024, 2, 29)


def read(path, settings=PLAIN, label=None):
    return list(read_documents(str(path), file=0, name="n", settings=settings, label=label))


def put(path, columns):
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), path)
    return path


def named(**columns):
    return DataSource(path="unused", columns=ColumnNames(**columns))


NOT_UTF8 = pa.array([b"\xff\xfe", b"fine"]).view(pa.string())
TEXT_COLUMNS = {
    "string": pa.array(["a", "b"]),
    "large_string": pa.array(["a", "b"], pa.large_string()),
    "string_view": pa.array(["a", "b"], pa.string_view()),
    "binary": pa.array([b"a", b"b"]),
    "large_binary": pa.array([b"a", b"b"], pa.large_binary()),
    "binary_view": pa.array([b"a", b"b"], pa.binary_view()),
    "fixed_size_binary": pa.array([b"a", b"b"], pa.binary(1)),
    "dictionary": pa.array(["a", "b"]).dictionary_encode(),
    "dictionary of bytes": pa.array([b"a", b"b"]).dictionary_encode(),
    "json": pa.array(["a", "b"], pa.json_()),
    "chunks": pa.chunked_array([["a"], ["b"]]),
}


@pytest.mark.parametrize("kind", TEXT_COLUMNS)
def test_text_of_any_type(tmp_path, kind):
    path = put(tmp_path / "a.parquet", {"text": TEXT_COLUMNS[kind], "source": TEXT_COLUMNS[kind]})
    assert [(d.text, d.source) for d in read(path)] == [("a", "a"), ("b", "b")]


NO_TEXT = {
    "null": (pa.nulls(2), "null text"),
    "int": (pa.array([1, 2]), "text is not a string but int"),
    "far date": (pa.array([2**62] * 2, pa.timestamp("us")), "text is not a string but int"),
    "list": (pa.array([["a"], ["b"]]), "text is not a string but list"),
    "fixed list": (pa.array([["a"]] * 2, pa.list_(pa.string(), 1)), "not a string but list"),
    "struct": (pa.array([{"body": "a", "n": 1}] * 2), "an object; name a key of it as `a.b`: body"),
    "map": (pa.array([[("k", "v")]] * 2, pa.map_(pa.string(), pa.string())), "but list"),
    "not UTF-8": (pa.array([b"\xff", b"\xfe"]).view(pa.string()), "invalid UTF-8"),
    "dictionary that is not UTF-8": (
        pa.array([b"\xff", b"\xfe"]).view(pa.string()).dictionary_encode(),
        "invalid UTF-8",
    ),
}


@pytest.mark.parametrize("kind", NO_TEXT)
def test_columns_that_are_no_text_cost_their_rows(tmp_path, kind):
    column, reason = NO_TEXT[kind]
    found = read(put(tmp_path / "a.parquet", {"text": column}))
    assert [d.row for d in found if isinstance(d, DeadLetter)] == [0, 1]
    assert all(reason in d.reason for d in found)


UUID = uuid.UUID("0f8fad5b-d9cb-469f-a165-70867728950e")
LABELS = {
    "int": (pa.array([7, None]), "7"),
    "unsigned": (pa.array([2**64 - 1, None], pa.uint64()), "18446744073709551615"),
    "whole float": (pa.array([7.0, None]), "7"),
    "half float": (pa.array([7.0, None], pa.float16()), "7"),
    "float": (pa.array([0.1, float("nan")]), "0.1"),
    "huge float": (pa.array([1e300, None]), "1e+300"),
    "decimal": (pa.array([Decimal("7.50"), None]), "7.50"),
    "bool": (pa.array([True, None]), "true"),
    "uuid": (pa.array([UUID.bytes, None], pa.uuid()), str(UUID)),
    "bytes of text": (pa.array([b"seven", None]), "seven"),
    "bytes": (pa.array([b"\xff\x00", None]), "ff00"),
    "digest": (pa.array([b"\x80" * 16, None], pa.binary(16)), "80" * 16),
    "date": (pa.array([DAY, None]), "2024-02-29"),
    "date64": (pa.array([DAY, None], pa.date64()), "2024-02-29"),
    "time": (pa.array([datetime.time(1, 2, 3), None]), "01:02:03"),
    "seconds": (pa.array([0, None], pa.timestamp("s")), "1970-01-01T00:00:00"),
    "zone": (pa.array([0, None], pa.timestamp("s", "Asia/Tokyo")), "1970-01-01T09:00:00+09:00"),
    "far": (pa.array([2**62, None], pa.timestamp("us")), str(2**62)),
    "far day": (pa.array([2**30, None], pa.date32()), str(2**30)),
    "duration": (pa.array([90, None], pa.duration("s")), "0:01:30"),
    "dictionary": (pa.array([7, None]).dictionary_encode(), "7"),
    "text": (pa.array([" 7", None]), " 7"),
}


@pytest.mark.parametrize("kind", LABELS)
def test_ids_and_sources_of_any_plain_type(tmp_path, kind):
    """Labels as they are written; without one, the place and `unknown`."""
    column, wanted = LABELS[kind]
    path = put(tmp_path / "a.parquet", {"text": ["x", "y"], "id": column, "source": column})
    assert [(d.id, d.source) for d in read(path)] == [(wanted, wanted), ("n:1", "unknown")]


NO_LABELS = {
    "list": pa.array([["a"]]),
    "struct": pa.array([{"set": "web"}]),
    "map": pa.array([[("k", "v")]], pa.map_(pa.string(), pa.string())),
}


@pytest.mark.parametrize("key", ["id", "source"])
@pytest.mark.parametrize("kind", NO_LABELS)
def test_values_that_are_no_label_are_told(tmp_path, kind, key):
    path = put(tmp_path / "a.parquet", {"text": ["x"], key: NO_LABELS[kind]})
    [letter] = read(path)
    assert letter.reason.startswith(f"`{key}` is no plain value but ")
    assert f"(`columns.{key}`)" in letter.reason


def test_labels_of_json(tmp_path):
    values = [7, 7.0, 7.5, "7", True, None, 10**30, [7], {"a": 7}, "\ud800"]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "x", "id": v}) + "\n" for v in values))
    *good, a_list, an_object, half = read(path)
    assert [d.id for d in good] == ["7", "7", "7.5", "7", "true", "n:5", "1" + "0" * 30]
    assert "no plain value but list" in a_list.reason
    assert "no plain value but dict" in an_object.reason
    assert "not Unicode (lone surrogate)" in half.reason


def test_dotted_paths_of_parquet(tmp_path):
    table = pa.table(
        {
            "doc": [{"body": "one", "meta": {"set": "web", "n": 1}}, {"body": "two", "meta": None}],
            "a.b": ["plain", "dots"],
            "a": [{"b": "no", "c": {"d": "yes"}}, None],
        }
    )
    path = put(tmp_path / "a.parquet", table)
    found = read(path, named(text="doc.body", source="doc.meta.set"))
    assert [(d.text, d.source) for d in found] == [("one", "web"), ("two", "unknown")]
    found = read(path, named(text="a.b", id="doc.meta.n", source="a.c.d"))
    assert [(d.text, d.id, d.source) for d in found] == [
        ("plain", "1", "yes"),
        ("dots", "n:1", "unknown"),
    ]
    for wrong in ("doc.title", "doc.body.x", "doc.meta.set.x", "b"):
        message = (
            rf"no column `{wrong}` \(`columns.source`\).*It has doc.body, doc.meta.set, doc.me"
        )
        with pytest.raises(InputError, match=message):
            read(path, named(text="doc.body", source=wrong))
    with pytest.raises(InputError, match=r"did you mean `doc\.meta\.set`"):
        read(path, named(text="doc.body", source="doc.meta.sets"))
    lists = put(tmp_path / "b.parquet", {"docs": [[{"body": "x"}]]})
    with pytest.raises(InputError, match=r"no column `docs\.body`"):
        read(lists, named(text="docs.body"))
    record = {"a": {"b": {"c": 1}, "b.c": 2}, "a.b": {"d": 3}, "n": None}
    assert (find(record, "a.b.d"), find(record, "a.b"), find(record, "n")) == (3, {"d": 3}, None)
    for absent in ("x", "n.x", "a.b.c.d", "a.", ".a", ""):
        assert find(record, absent) is ABSENT


def test_of_a_struct_only_the_leaf_is_read(tmp_path, monkeypatch):
    """Beside the text of 1,000 documents lies a megabyte that no one asked for."""
    blobs = [random.Random(i).randbytes(1000) for i in range(1000)]
    rows = [{"text": f"t{i}", "blob": blob} for i, blob in enumerate(blobs)]
    path = put(tmp_path / "a.parquet", pa.table({"doc": rows}))
    assert path.stat().st_size > 1_000_000
    read_bytes = []

    class Counting(io.FileIO):
        def readinto(self, buffer):
            read_bytes.append(super().readinto(buffer))
            return read_bytes[-1]

    monkeypatch.setattr(records, "open_read", lambda uri: io.BufferedReader(Counting(uri), 16))
    assert [d.text for d in read(path, named(text="doc.text"))] == [f"t{i}" for i in range(1000)]
    assert sum(read_bytes) < 100_000


def test_dotted_paths_of_json(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [
        {"doc": {"body": "one"}, "meta": {"source": "web"}},
        {"doc": {"body": "two"}, "meta.source": "dots", "meta": {"source": "no"}},
        {"doc": {"body": "three"}, "meta": None},
        {"doc": "four"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, two, three, four = read(path, named(text="doc.body", source="meta.source"))
    assert [(d.text, d.source) for d in (one, two, three)] == [
        ("one", "web"),
        ("two", "dots"),
        ("three", "unknown"),
    ]
    assert four.reason == "no key `doc.body`; keys: doc"


def test_two_columns_of_one_name(tmp_path):
    def twins(*names):
        return pa.Table.from_arrays([pa.array([str(i)]) for i, _ in enumerate(names)], list(names))

    path = put(tmp_path / "twins.parquet", twins("text", "text"))
    with pytest.raises(BadFileError, match=r"twins.parquet: .*2 columns are called `text`"):
        read(path)
    path = put(tmp_path / "ids.parquet", twins("text", "id", "id", "id"))
    with pytest.raises(BadFileError, match=r"ids.parquet: .*3 columns are called `id`"):
        read(path)
    path = put(tmp_path / "other.parquet", twins("text", "x", "x"))
    assert [d.text for d in read(path)] == ["0"]


def test_json_rows_without_a_named_key_say_so(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x", "domain": "web"}\n{"text": "y", "id": 1}\n')
    nested = tmp_path / "b.jsonl"
    nested.write_text('{"text": "x", "meta": {"set": {"name": "web"}, "n": 1}, "empty": {}}')
    [found] = read(nested, named(source="meta.source"))
    assert found.absent.endswith("; keys: text, meta.set.name, meta.n, empty")
    first, second = read(path, named(source="domain"))
    assert (first.absent, first.source) == ("", "web")
    assert second.absent == "no key `domain` (`columns.source`); keys: text, id"
    assert [d.absent for d in read(path)] == ["", ""]


def test_a_given_label_stands_for_the_column(tmp_path):
    """As a folder's name gives it: the file need not have the column, nor is its own read."""
    path = put(tmp_path / "a.parquet", {"text": ["x"], "domain": ["own"]})
    assert [d.source for d in read(path, named(source="domain"), label="web")] == ["web"]
    bare = put(tmp_path / "b.parquet", {"text": ["x"]})
    assert [d.source for d in read(bare, named(source="domain"), label="web")] == ["web"]
