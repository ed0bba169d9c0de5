import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillhouse.data_settings import ColumnNames, DataSource
from stillhouse.errors import BadFileError, InputError
from stillhouse.text.documents import (
    DeadLetter,
    Document,
    read_documents,
)

PLAIN = DataSource(path="unused")
NAMED = DataSource(path="unused", columns=ColumnNames(text="body", id="key", source="kind"))


def read(path, settings=PLAIN, **rows):
    return list(read_documents(str(path), file=3, name="n", settings=settings, **rows))


def write_parquet(path, columns, **options):
    pq.write_table(pa.table(columns), path, **options)
    return path


def lines(path, *values):
    data = b"\n".join(v if isinstance(v, bytes) else json.dumps(v).encode() for v in values)
    if path.suffix == ".gz":
        data = gzip.compress(data)
    if path.suffix == ".zst":
        data = pa.compress(data, codec="zstd", asbytes=True)
    path.write_bytes(data)
    return path


def dead(row, reason, preview=""):
    return DeadLetter(3, row, reason, preview)


def test_parquet_columns_and_their_defaults(tmp_path):
    path = write_parquet(
        tmp_path / "a.parquet",
        {
            "text": ["one", "two", "three"],
            "id": [7, None, 9],
            "source": ["web", None, "books"],
            "more": [1.0, 2.0, 3.0],
        },
    )
    assert read(path) == [
        Document(3, 0, "7", "web", "one"),
        Document(3, 1, "n:1", "unknown", "two"),
        Document(3, 2, "9", "books", "three"),
    ]
    labelled = DataSource(path="x", source="mine")
    assert [d.source for d in read(path, labelled)] == ["web", "mine", "books"]


def test_a_missing_column_is_named_with_those_that_exist(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"texts": ["x"], "number": [1]})
    message = r"no column `text` \(`columns.text`\); did you mean `texts`\. It has texts, number"
    with pytest.raises(InputError, match=message):
        read(path)
    settings = DataSource(path="x", columns=ColumnNames(text="texts", source="domain"))
    with pytest.raises(InputError, match=r"no column `domain` \(`columns.source`\)"):
        read(path, settings)


def test_parquet_ranges_and_single_rows(tmp_path):
    texts = [f"t{i}" for i in range(1000)]
    path = write_parquet(tmp_path / "a.parquet", {"text": texts}, row_group_size=300)
    assert [d.row for d in read(path, rows=range(250, 610))] == list(range(250, 610))
    wanted = [0, 299, 300, 301, 999]
    assert [(d.row, d.text) for d in read(path, rows=wanted)] == [(r, f"t{r}") for r in wanted]
    assert read(path, rows=[]) == []


def test_bad_rows_of_parquet(tmp_path):
    short = DataSource(path="x", max_chars=5)
    path = write_parquet(tmp_path / "a.parquet", {"text": ["fine", None, "", " \n", "too long"]})
    assert read(path, short) == [
        Document(3, 0, "n:0", "unknown", "fine"),
        dead(1, "null text"),
        dead(2, "empty text"),
        dead(3, "empty text", " \n"),
        dead(4, "longer than 5 characters", "too long"),
    ]
    numbers = write_parquet(tmp_path / "b.parquet", {"text": [1, 2]})
    assert read(numbers)[0] == dead(0, "text is not a string but int", "1")


def test_parquet_bytes_and_invalid_utf8(tmp_path):
    raw = pa.array([b"caf\xc3\xa9", b"\xff\xfe", None])
    path = write_parquet(tmp_path / "a.parquet", {"text": raw})
    expected = [
        Document(3, 0, "n:0", "unknown", "café"),
        dead(1, "invalid UTF-8", "\ufffd\ufffd"),
        dead(2, "null text"),
    ]
    assert read(path) == expected
    marked = pa.StringArray.from_buffers(3, raw.buffers()[1], raw.buffers()[2], raw.buffers()[0])
    assert read(write_parquet(tmp_path / "b.parquet", {"text": marked})) == expected


@pytest.mark.parametrize("name", ["a.jsonl", "A.JSON", "a.ndjson.gz", "a.jsonl.zst"])
def test_json_lines_with_every_kind_of_bad_row(tmp_path, name):
    path = lines(
        tmp_path / name,
        b"\xef\xbb\xbf" + b'{"text": "first", "id": 5, "source": "web"}',
        b"",
        {"text": "second", "id": True, "source": None},
        b'{"text": ',
        b'{"text": "\xff"}',
        [1],
        {"body": "x", "other": 1},
        {"text": None},
        {"text": 4},
        b'{"text": "\\ud800"}',
        b"[" * 100_000,
        {"text": "last"},
    )
    results = read(path)
    assert [r for r in results if isinstance(r, Document)] == [
        Document(3, 0, "5", "web", "first"),
        Document(3, 2, "true", "unknown", "second"),
        Document(3, 11, "n:11", "unknown", "last"),
    ]
    reasons = {r.row: r.reason for r in results if isinstance(r, DeadLetter)}
    assert reasons.pop(3).startswith("broken JSON: Expecting value")
    assert reasons.pop(10).startswith("broken JSON: ")
    assert reasons == {
        4: "invalid UTF-8",
        5: "not a JSON object but list",
        6: "no key `text`; keys: body, other",
        7: "null text",
        8: "text is not a string but int",
        9: "invalid Unicode (lone surrogate)",
    }
    previews = {r.row: r.preview for r in results if isinstance(r, DeadLetter)}
    assert all(len(preview.encode()) <= 200 for preview in previews.values())
    assert (previews[6], previews[7], previews[8]) == ("", "", "4")


def test_json_ranges_single_rows_and_names(tmp_path):
    path = lines(
        tmp_path / "a.jsonl", *({"body": f"t{i}", "key": i, "kind": "s"} for i in range(9))
    )
    assert [d.text for d in read(path, NAMED, rows=range(2, 4))] == ["t2", "t3"]
    found = [Document(3, 1, "1", "s", "t1"), Document(3, 8, "8", "s", "t8")]
    assert read(path, NAMED, rows=[1, 8]) == found


def test_a_line_beyond_all_limits_is_skipped_without_reading_it_whole(tmp_path):
    long = b'{"text": "' + b"x" * 3_000_000 + b'"}'
    path = lines(tmp_path / "a.jsonl", long, {"text": "next"})
    first, second = read(path, DataSource(path="x", max_chars=10))
    assert first.reason == "line longer than 1048696 bytes (`max_chars`)"
    assert first.preview == '{"text": "' + "x" * 190
    assert second == Document(3, 1, "n:1", "unknown", "next")


def test_plain_text_is_one_document(tmp_path):
    path = tmp_path / "a.md"
    path.write_text("# title\n\nbody\n")
    settings = DataSource(path="x", source="notes")
    assert read(path, settings) == [Document(3, 0, "n:0", "notes", "# title\n\nbody\n")]
    assert read(path, rows=range(1, 2)) == []
    for limit in (3, 2):
        assert read(path, DataSource(path="x", max_chars=limit))[0].reason == (
            f"longer than {limit} characters (`max_chars`), a plain text file is one document"
        )
    path.write_bytes(b"ab\xff")
    assert read(path) == [dead(0, "invalid UTF-8", "ab\ufffd")]
    path.write_bytes(b"")
    assert read(path) == [dead(0, "empty text")]


def test_damaged_parquet_is_a_bad_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "a.parquet")
    path = write_parquet(tmp_path / "a.parquet", {"text": [str(i) * 9 for i in range(5000)]})
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    with pytest.raises(BadFileError, match="cannot be read"):
        read(path)
    path.write_bytes(whole[:4] + bytes(2000) + whole[2004:])
    with pytest.raises(BadFileError, match="cannot be read"):
        read(path)
