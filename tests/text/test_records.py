import pytest

from stillhouse.errors import InputError
from stillhouse.spec import DataSource
from stillhouse.text.records import Record, format_of, listed_suffixes, read_records

PLAIN = DataSource(path="unused")


def test_format_by_suffix_or_by_setting():
    assert format_of("s3://b/x.PARQUET", PLAIN) == "parquet"
    assert format_of("x.json.gz", PLAIN) == "jsonl"
    assert format_of("x.data", DataSource(path="x", format="text")) == "text"
    with pytest.raises(InputError, match="unknown suffix"):
        format_of("x.csv", PLAIN)


def test_suffixes_of_a_listing_are_those_that_have_a_format():
    listed = listed_suffixes("parquet", "jsonl", "text")
    assert {".parquet", ".pq", ".jsonl", ".jsonl.zst", ".json.gz", ".txt"} <= set(listed)
    assert ".json" not in listed
    assert {format_of("a" + suffix, PLAIN) for suffix in listed} == {"parquet", "jsonl", "text"}
    assert {format_of("a" + s, PLAIN) for s in listed_suffixes("jsonl")} == {"jsonl"}


def test_records_are_raw(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": 4, "id": null}\n{\n[]\n')
    first, second, third = read_records(str(path), PLAIN, range(10))
    assert first == Record(0, 4)
    assert (second.row, second.text) == (1, b"{\n")
    assert third == Record(2, b"[]\n", broken="not a JSON object but list")
    assert list(read_records(str(path), PLAIN, [2])) == [third]
