"""Every form that a file of rows comes in: read, or refused with the word for what it is."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillhouse.data_settings import DataSource
from stillhouse.errors import BadFileError, InputError
from stillhouse.text.documents import DeadLetter, read_documents
from stillhouse.text.formats import FORMATS, format_of, listed_suffixes, ranked_suffixes

PLAIN = DataSource(path="unused")
TEXTS = ["one é", "two 😀", "three"]
LINES = "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in TEXTS).encode()


def read(path, settings=PLAIN):
    return list(read_documents(str(path), file=0, name="n", settings=settings))


def texts(path):
    return [found.text for found in read(path)]


def put(path, data):
    path.write_bytes(data)
    return path


def parquet_bytes(columns):
    data = io.BytesIO()
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), data)
    return data.getvalue()


def zst(data):
    return pa.compress(data, codec="zstd", asbytes=True)


def test_format_by_suffix_or_by_setting():
    assert format_of("s3://b/x.PARQUET", "auto") == "parquet"
    assert format_of("x.json.gz", "auto") == "jsonl"
    assert format_of("x.md.xz", "auto") == "text"
    assert format_of("x.data", "text") == "text"
    assert format_of("https://host/a/x.jsonl.gz?sig=a.b#top", "auto") == "jsonl"
    assert format_of("s3://bucket/x?.jsonl", "auto") == "jsonl"
    assert format_of("x.tsv.gz", "auto") == "tsv"
    with pytest.raises(InputError, match="unknown suffix"):
        format_of("x.xlsx", "auto")


def test_suffixes_of_a_listing_are_those_that_have_a_format():
    listed = listed_suffixes("parquet", "jsonl", "text")
    assert {format_of("a" + s) for rank in ranked_suffixes() for s in rank} == {*FORMATS} - {
        "lance"
    }
    assert {".parquet", ".pq", ".jsonl", ".jsonl.zst", ".json.gz", ".txt", ".jsonl.bz2"} <= set(
        listed
    )
    assert ".json" not in listed
    assert {format_of("a" + suffix, "auto") for suffix in listed} == {"parquet", "jsonl", "text"}
    assert {format_of("a" + s, "auto") for s in listed_suffixes("jsonl")} == {"jsonl"}


SKIPPED = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"  # a skippable frame, as pzstd writes
HALVES = LINES[:11], LINES[11:]
TABLE = "id,text\n" + "".join(f"{i},{text}\n" for i, text in enumerate(TEXTS))
FORMS = {
    "bom.jsonl": b"\xef\xbb\xbf" + LINES,
    "crlf.jsonl": LINES.replace(b"\n", b"\r\n"),
    "no-end.jsonl": LINES[:-1],
    "blank.jsonl": b"\n \n" + LINES.replace(b"\n", b"\n\n"),
    "utf16.jsonl": LINES.decode().encode("utf-16"),
    "utf16-big.jsonl": b"\xfe\xff" + LINES.decode().encode("utf-16-be"),
    "utf16-no-mark.jsonl": LINES.decode().encode("utf-16-le"),
    "utf16-big-no-mark.jsonl": LINES.decode().encode("utf-16-be"),
    "utf32.jsonl": LINES.decode().encode("utf-32"),
    "utf16.jsonl.gz": gzip.compress(LINES.decode().encode("utf-16")),
    "gz.jsonl.gz": gzip.compress(LINES),
    "GZ.JSONL.GZ": gzip.compress(LINES),
    "gz.jsonl": gzip.compress(LINES),
    "members.jsonl.gz": b"".join(map(gzip.compress, HALVES)) + b"\0" * 1000,
    "padded-members.jsonl.gz": (b"\0" * 3).join(map(gzip.compress, HALVES)),
    "empty-member.jsonl.gz": gzip.compress(b"") + gzip.compress(LINES),
    "zst.jsonl.zst": zst(LINES),
    "zst.jsonl": zst(LINES),
    "frames.jsonl.zst": SKIPPED + b"".join(map(zst, HALVES)),
    "bz2.jsonl.bz2": bz2.compress(LINES),
    "streams.jsonl.bz2": b"".join(map(bz2.compress, HALVES)),
    "bz2.jsonl": bz2.compress(LINES),
    "xz.jsonl.xz": lzma.compress(LINES),
    "xz.jsonl": lzma.compress(LINES),
    "zst-called-gz.jsonl.gz": zst(LINES),
    "parquet.jsonl": parquet_bytes({"text": TEXTS}),
    "array.json": json.dumps([{"text": t} for t in TEXTS]).encode(),
    "array.jsonl": b" \n" + json.dumps([{"text": t} for t in TEXTS], indent=2).encode(),
    "array-lines.jsonl": b"[\n" + LINES.replace(b"}\n", b"},\n") + b"]\n",
    "array-bom.json": b"\xef\xbb\xbf[" + LINES.replace(b"}\n", b"},\n") + b"]",
    "array.json.gz": gzip.compress(json.dumps([{"text": t} for t in TEXTS]).encode()),
    "array-utf16.json": json.dumps([{"text": t} for t in TEXTS]).encode("utf-16"),
    "indented.jsonl": "\n".join(json.dumps({"text": t}, indent=2) for t in TEXTS).encode(),
    "indented-bom.json": b"\xef\xbb\xbf"
    + ",\r\n".join(json.dumps({"text": t}, indent="\t") for t in TEXTS).encode(),
    "commas.jsonl": LINES.replace(b"}\n", b"},\n"),
    "comma.csv": TABLE.encode(),
    "bom.csv": b"\xef\xbb\xbf" + TABLE.encode(),
    "utf16.csv": TABLE.encode("utf-16"),
    "crlf.csv.gz": gzip.compress(TABLE.replace("\n", "\r\n").encode()),
    "tab.tsv": TABLE.replace(",", "\t").encode(),
    "tab.tsv.zst": zst(TABLE.replace(",", "\t").encode()),
}


def archive(make):
    data = io.BytesIO()
    make(data)
    return data.getvalue()


def write_arrow(data):
    table = pa.table({"text": TEXTS})
    with pa.ipc.new_file(data, table.schema) as file:
        file.write_table(table)


def write_stream(data):
    table = pa.table({"text": TEXTS})
    with pa.ipc.new_stream(data, table.schema) as file:
        file.write_table(table)


FORMS |= {
    "file.arrow": archive(write_arrow),
    "stream.arrow": archive(write_stream),
    "arrow.jsonl": archive(write_arrow),
    "arrow.parquet": archive(write_arrow),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_that_are_read(tmp_path, name):
    assert texts(put(tmp_path / name, FORMS[name])) == TEXTS


def test_large_arrays_and_objects_of_many_lines(tmp_path):
    """Values that cross the borders of blocks."""
    wanted = [f"{i} " + "x é\\n" * (i % 7 * 10_000) for i in range(120)]
    rows = [{"text": text, "n": [1, {"a": None}]} for text in wanted]
    for indent in (None, 1):
        assert texts(put(tmp_path / "a.json", json.dumps(rows, indent=indent).encode())) == wanted
    content = "\n".join(json.dumps(row, indent=1, ensure_ascii=False) for row in rows)
    assert texts(put(tmp_path / "b.jsonl", content.encode())) == wanted


def test_bad_rows_of_an_array(tmp_path):
    content = b'["plain", {"text": null}, {"text": "fine"}, [1], {"body": 1}, {"text": "\\ud800"}]'
    found = read(put(tmp_path / "a.json", content))
    assert [d.row for d in found if not isinstance(d, DeadLetter)] == [2]
    assert {d.row: d.reason for d in found if isinstance(d, DeadLetter)} == {
        0: "not a JSON object but str",
        1: "null text",
        3: "not a JSON object but list",
        4: "no key `text`; keys: body",
        5: "invalid Unicode (lone surrogate)",
    }


def test_a_list_in_a_line_is_no_array(tmp_path):
    found = read(put(tmp_path / "a.jsonl", b"[1]\n" + LINES))
    assert found[0] == DeadLetter(0, 0, "not a JSON object but list", "[1]\n")
    assert [d.text for d in found[1:]] == TEXTS


def write_zip(data):
    with zipfile.ZipFile(data, "w") as file:
        file.writestr("a.jsonl", LINES)


def write_tar(data):
    with tarfile.open(fileobj=data, mode="w") as file:
        member = tarfile.TarInfo("a.jsonl")
        member.size = len(LINES)
        file.addfile(member, io.BytesIO(LINES))


def zstd_of_window(log):
    """A sound frame of one raw block that declares a window of 2^log bytes."""
    start = b"\x28\xb5\x2f\xfd\x00" + bytes([(log - 10) << 3])
    return start + (len(LINES) << 3 | 1).to_bytes(3, "little") + LINES


REFUSED = {
    "page.jsonl": (b"\n<!DOCTYPE html>\n<html><body>403</body></html>", "HTML page"),
    "page.json.gz": (gzip.compress(b"<HTML lang=en>"), "HTML page"),
    "error.jsonl": (b'<?xml version="1.0"?><Error/>', "XML document"),
    "page.parquet": (b"<!doctype html><title>login</title>", "not Parquet"),
    "zip.jsonl": (archive(write_zip), "zip archive: unpack it"),
    "tar.jsonl.gz": (gzip.compress(archive(write_tar)), "tar archive: unpack it"),
    "feather-1.feather": (b"FEA1\0\0\0\0", "Feather file of version 1"),
    "lines.arrow": (LINES, "not Arrow: it begins with"),
    "arrow.arrow.gz": (gzip.compress(archive(write_arrow)), "Arrow cannot be read inside gzip"),
    "cut.arrow": (archive(write_arrow)[:-9], "cut off: an Arrow file ends with"),
    "cut-stream.arrow": (archive(write_stream)[:-60], "Expected to read"),
    "page.csv": (b"<!DOCTYPE html>\n<html><body>403</body></html>", "HTML page"),
    "open-header.csv": (b'"text\na,b\n', "a quote is never closed"),
    "twins.csv": (b"text,x,text\n", "2 columns are called `text`"),
    "report.txt": (b"%PDF-1.7\n", "a PDF"),
    "pointer.jsonl": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "Git LFS"),
    "pointer.parquet": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "not Parquet"),
    "lines.parquet": (LINES, "not Parquet: it begins with"),
    "lines.parquet.gz": (gzip.compress(parquet_bytes({"text": TEXTS})), "inside gzip"),
    "empty.parquet": (b"", "no bytes"),
    "plain.jsonl.gz": (LINES, "its suffix says gzip, but it is not"),
    "plain.jsonl.xz": (LINES, "its suffix says xz, but it is not"),
    "cut.jsonl.gz": (gzip.compress(LINES)[:-9], "cut off: it ends in the middle"),
    "cut.jsonl.zst": (zst(LINES)[:-9], "Truncated"),
    "cut.jsonl.bz2": (bz2.compress(LINES)[:-9], "ended before the end"),
    "cut.jsonl.xz": (lzma.compress(LINES)[:-9], "ended before the end"),
    "cut-member.jsonl.gz": (gzip.compress(LINES) + gzip.compress(LINES)[:-9], "cut off"),
    "behind.jsonl.gz": (
        gzip.compress(LINES) + b"\0\0garbage!",
        f"from byte {len(gzip.compress(LINES)) + 2} on, it is no gzip",
    ),
    "window.jsonl.zst": (zstd_of_window(31), "window is above 128 MB.*--long"),
    "cut.json": (b'[{"text": "one"}, {"text": "tw', "broken JSON in row 1"),
    "no-end.json": (b'[{"text": "one"},\n', "broken JSON in row 1"),
    "broken.json": (b'[{"text": "one"}, {"text" "two"}, {"text": "three"}]', "JSON in row 1"),
    "behind.json": (b'[{"text": "one"},\n{"text": "two"}]\n[3]', "more behind its JSON array"),
    "deep.json": (b"[" * 100_000, "broken JSON in row 0"),
    "odd.jsonl": (LINES.decode().encode("utf-16")[:-1], "truncated data"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_forms_that_are_refused_by_name(tmp_path, name):
    content, word = REFUSED[name]
    path = put(tmp_path / name, content)
    with pytest.raises(BadFileError, match=rf"{name}: cannot be read: .*{word}.*skip_bad_files"):
        read(path)


def test_text_in_other_encodings(tmp_path):
    assert texts(put(tmp_path / "a.txt", "naïve\r\ntext".encode("utf-16"))) == ["naïve\r\ntext"]
    assert texts(put(tmp_path / "b.txt.gz", gzip.compress(b"\xef\xbb\xbfplain"))) == ["plain"]
    [latin] = read(put(tmp_path / "c.txt", "café".encode("latin-1")))
    assert latin == DeadLetter(0, 0, "invalid UTF-8", "caf\ufffd")
    for name, text in (("d.txt", "<html> is where a page begins"), ("e.md", "ORCHARDS in May")):
        assert texts(put(tmp_path / name, text.encode())) == [text]
    content = '{"text": "a"}\n{"text": "\ud800"}\n{"text": "b"}\n'.encode("utf-16", "surrogatepass")
    found = read(put(tmp_path / "f.jsonl", content))
    assert [getattr(d, "text", None) or d.reason for d in found] == ["a", "invalid UTF-8", "b"]


def test_files_without_rows(tmp_path):
    for name in ("a.jsonl", "a.txt", "a.jsonl.gz", "a.json"):
        found = read(put(tmp_path / name, b""))
        assert [d.reason for d in found] == (["empty text"] if name == "a.txt" else [])
    schema = pa.schema([("text", pa.string())])
    with pq.ParquetWriter(tmp_path / "none.parquet", schema):
        pass
    assert pq.ParquetFile(tmp_path / "none.parquet").num_row_groups == 0
    assert read(tmp_path / "none.parquet") == []
    empty = parquet_bytes(schema.empty_table())
    assert read(put(tmp_path / "zero.parquet", empty)) == []
