"""CSV and TSV: against Python's own writer and values by hand; rows that are not of the table."""

import csv
import io
import itertools
import tracemalloc

import pytest

from stillhouse.data_settings import ColumnNames, DataSource
from stillhouse.errors import BadFileError, InputError
from stillhouse.text.documents import DeadLetter, read_documents
from stillhouse.text.records import read_records

ROWS = [
    {"id": "1", "text": "plain", "topic": "a"},
    {"id": "2", "text": 'quotes " and, commas\tand tabs', "topic": ""},
    {"id": "3", "text": "two\nlines\r\nthree", "topic": "ü"},
    {"id": "4", "text": "😀 \x00 nul", "topic": "a"},
]
NAMED = DataSource(path="unused", columns=ColumnNames(source="topic"), max_chars=1000)


def read(path, settings=NAMED, rows=range(10**9)):
    return list(read_documents(str(path), file=0, name="n", settings=settings, rows=rows))


def put(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(("name", "dialect"), [("a.csv", "excel"), ("a.tsv", "excel-tab")])
def test_what_python_writes_is_read(tmp_path, name, dialect):
    written = io.StringIO()
    writer = csv.DictWriter(written, ["id", "text", "topic"], dialect=dialect)
    writer.writeheader()
    writer.writerows(ROWS)
    path = put(tmp_path / name, written.getvalue())
    wanted = [(i, r["id"], r["topic"] or "unknown", r["text"]) for i, r in enumerate(ROWS)]
    assert [(d.row, d.id, d.source, d.text) for d in read(path)] == wanted
    for rows in itertools.combinations(range(4), 2):
        assert [d.id for d in read(path, rows=rows)] == [ROWS[i]["id"] for i in rows]


def test_bad_rows_have_number_reason_and_beginning(tmp_path):
    content = (
        b"text,topic\n"
        b"one,a\n"
        b"short\n"
        b"too,many,fields\n"
        b"\n"
        b'"two ""quoted""",a\n'
        b'"closed" early,a\n'
        b"caf\xe9,a\n"
        b",a\n"
        b"three,a\n"
    )
    found = read(put(tmp_path / "a.csv", content))
    assert [(d.row, d.text) for d in found if not isinstance(d, DeadLetter)] == [
        (0, "one"),
        (4, 'two "quoted"'),
        (8, "three"),
    ]
    dead = {d.row: (d.reason, d.preview) for d in found if isinstance(d, DeadLetter)}
    assert dead == {
        1: ("1 fields; the header has 2", "short\n"),
        2: ("3 fields; the header has 2", "too,many,fields\n"),
        5: ("broken CSV: ',' expected after '\"'", '"closed" early,a\n'),
        6: ("invalid UTF-8", "caf\ufffd,a\n"),
        7: ("empty text", ""),
    }


def test_a_quote_that_is_never_closed_breaks_the_file(tmp_path):
    """It could hide any number of rows; so could a file that is cut off there."""
    path = put(tmp_path / "a.csv", 'text,n\none,1\n"two,2\nthree,3\n')
    with pytest.raises(BadFileError, match=r"a\.csv: .*a quote is never closed, in the row '\"two"):
        read(path, DataSource(path="unused"))
    within = put(tmp_path / "b.csv", 'text,n\n5" pipe,1\nsix,2\n')
    assert [d.text for d in read(within, DataSource(path="unused"))] == ['5" pipe', "six"]


def test_a_file_without_header_is_refused_by_what_it_begins_with(tmp_path):
    path = put(tmp_path / "a.csv", "1,hello\n2,world\n")
    said = r"a\.csv: no column `text`.* It has 1, hello \(the first row, which has the names"
    with pytest.raises(InputError, match=said):
        read(path, DataSource(path="unused"))
    assert read(put(tmp_path / "none.csv", "")) == []
    assert read(put(tmp_path / "header.csv", "text,topic")) == []


@pytest.mark.parametrize("ends", ["", '"'])
def test_rows_that_are_too_long_take_little_memory_and_no_other_row(tmp_path, ends):
    """A line of 16 MB, a quoted field of one line and one of many lines, each a bad row."""
    long, lines = "x" * (16 << 20), f'x ""y"" {"z" * 100}\n,\n' * (1 << 16)
    text = f'text,n\none,1\n{long},2\ntwo,3\n"{long}""\n{ends.replace(chr(34), chr(34) * 2)}",4\n'
    text += f'three,5\n"{lines}{ends.replace(chr(34), chr(34) * 2)}",6\nfour,7\n'
    path = put(tmp_path / "a.csv", text)
    del text
    tracemalloc.start()
    found = read(path, DataSource(path="unused", max_chars=1000))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [getattr(d, "text", None) for d in found] == [
        "one",
        None,
        "two",
        None,
        "three",
        None,
        "four",
    ]
    assert {d.reason for d in found if isinstance(d, DeadLetter)} == {
        "row longer than 1052576 bytes (`max_chars`)"
    }
    assert most < 12 << 20


def test_a_text_that_is_a_little_too_long(tmp_path):
    path = put(tmp_path / "b.csv", f'text\n"{"y" * 1001}"\nz\n')
    plain = DataSource(path="unused", max_chars=1000)
    found = [getattr(d, "reason", None) for d in read(path, plain)]
    assert found == ["longer than 1000 characters", None]


def test_only_the_chosen_columns_are_kept(tmp_path):
    path = put(tmp_path / "a.csv", "a.b,c\n1,2\n")
    [row] = read_records(str(path), lambda _: ["a.b"], text="c", max_chars=9)
    assert row.values == {"a.b": "1"}
