"""WARC and WET files, as warcio writes them: pages become rows, other records do not."""

import gzip
import io

import pytest
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from stillhouse import errors
from stillhouse.data_settings import ColumnNames, DataSource
from stillhouse.errors import BadFileError, InputError, MissingExtraError
from stillhouse.pipelines.inputs import list_source
from stillhouse.text.documents import DeadLetter, read_documents

PLAIN = DataSource(path="unused", columns=ColumnNames(source="url"))
PAGE = """<!doctype html><html><head><title>T</title>{meta}<script>let x = 1</script></head><body>
<nav><a href="/">Home</a><a href="/all">All pages</a></nav>
<article><h1>Größe</h1><p>The first paragraph, of ümlauts.</p><p>The second.</p></article>
<footer>Imprint</footer></body></html>"""
TEXT = "Größe\n\nThe first paragraph, of ümlauts.\n\nThe second."


def warc(*records, compress=True):
    """A file of (kind, url, media type, content, status or None)."""
    data = io.BytesIO()
    writer = WARCWriter(data, gzip=compress)
    writer.write_record(writer.create_warcinfo_record("a.warc", {"software": "test"}))
    for kind, url, media, content, status in records:
        http = None
        if status is not None:
            headers = [("Content-Type", media)]
            if status == "zip":
                status, content = "200 OK", gzip.compress(content)
                headers.append(("Content-Encoding", "gzip"))
            http = StatusAndHeaders(status, headers, protocol="HTTP/1.1")
        stamps = {"WARC-Date": "2024-05-01T00:00:00Z", "WARC-Record-ID": f"<urn:uuid:{url}>"}
        writer.write_record(
            writer.create_warc_record(
                url,
                kind,
                payload=io.BytesIO(content),
                http_headers=http,
                warc_content_type=None if http else media,
                warc_headers_dict=stamps,
            )
        )
    return data.getvalue()


def read(path, settings=PLAIN, rows=range(10**9)):
    return list(read_documents(str(path), file=0, name="n", settings=settings, rows=rows))


def put(path, data):
    path.write_bytes(data)
    return path


WET = [
    ("conversion", f"http://a.org/{i}", "text/plain", f"Seite {i} ü".encode(), None)
    for i in range(5)
]


@pytest.mark.parametrize(("name", "compress"), [("a.warc.wet.gz", True), ("a.wet", False)])
def test_the_texts_of_wet_files(tmp_path, name, compress):
    """Record 0 is the file's own description."""
    path = put(tmp_path / name, warc(*WET, compress=compress))
    assert [f.name for f in list_source(DataSource(path=str(tmp_path)))] == [name]
    found = read(path)
    assert [(d.row, d.source, d.id, d.text) for d in found] == [
        (i + 1, f"http://a.org/{i}", f"urn:uuid:http://a.org/{i}", f"Seite {i} ü") for i in range(5)
    ]
    assert [d.row for d in read(path, rows=[0, 2, 5])] == [2, 5]
    dated = read(path, DataSource(path="unused", columns=ColumnNames(source="date")))
    assert {d.source for d in dated} == {"2024-05-01T00:00:00Z"}
    with pytest.raises(InputError, match=r"no column `lang`.* It has text, url, date, id"):
        read(path, DataSource(path="unused", columns=ColumnNames(source="lang")))


def test_pages_of_responses(tmp_path):
    """By charset of the header, of the page, and by guess; compressed; and what is no page."""
    page = PAGE.format(meta="")
    latin = PAGE.format(meta='<meta charset="iso-8859-1">')
    responses = [
        ("text/html; charset=utf-8", page.encode(), "200 OK"),
        ("text/html; charset=ISO-8859-1", page.encode("latin-1"), "200 OK"),
        ("text/html", latin.encode("latin-1"), "200 OK"),
        ("text/html; charset=klingon", page.encode(), "200 OK"),
        ("application/xhtml+xml", page.encode(), "zip"),
        ("text/plain; charset=cp1252", "Größe".encode("cp1252"), "200 OK"),
        ("text/plain", "Größe".encode(), "200 OK"),
        ("text/plain", "Größe".encode("latin-1"), "200 OK"),
        ("text/html", b"<html><body><script>1</script></body></html>", "200 OK"),
        ("text/html", page.encode(), "404 Not Found"),
        ("image/png", b"\x89PNG", "200 OK"),
    ]
    records = [("response", f"http://{i}", *one) for i, one in enumerate(responses, 1)]
    records.append(("request", "http://x", "application/http", b"GET /", None))
    records.append(("resource", "http://r", "text/plain", b"A file.", None))
    found = read(put(tmp_path / "a.warc.gz", warc(*records)))
    texts = {d.row: d.text for d in found if not isinstance(d, DeadLetter)}
    assert texts == dict.fromkeys(range(1, 6), TEXT) | {6: "Größe", 7: "Größe", 13: "A file."}
    dead = {d.row: d.reason for d in found if isinstance(d, DeadLetter)}
    assert dead == {8: "invalid UTF-8", 9: "empty text"}


def test_files_that_are_cut_off_or_no_warc(tmp_path):
    """Wherever a plain file is cut, but between two records."""
    whole = warc(*WET[:2], compress=False)
    for end in range(1, len(whole) - 4):
        if whole[end:].lstrip(b"\r\n").startswith(b"WARC/"):
            continue
        path = put(tmp_path / "a.warc", whole[:end])
        with pytest.raises(BadFileError, match=r"a\.warc: cannot be read: .*record"):
            read(path)
    packed = warc(*WET)
    with pytest.raises(BadFileError, match="middle of its gzip"):
        read(put(tmp_path / "b.warc.gz", packed[:-9]))
    with pytest.raises(BadFileError, match="no WARC record begins"):
        read(put(tmp_path / "c.warc", b"what is this\n" * 9))
    assert read(put(tmp_path / "d.warc", b"")) == []


def test_a_page_that_is_too_long(tmp_path):
    records = [("conversion", "http://1", "text/plain", b"x" * (6 << 20), None), *WET[:1]]
    first, second = read(
        put(tmp_path / "a.wet.gz", warc(*records)), DataSource(path="unused", max_chars=1000)
    )
    assert (first.row, first.reason) == (1, "longer than 1000 characters")
    assert (second.row, second.text) == (2, "Seite 0 ü")


def test_without_the_extra(tmp_path, monkeypatch):
    put(tmp_path / "a.warc.gz", warc(*WET))
    monkeypatch.setattr(errors, "find_spec", lambda module: None if module == "warcio" else module)
    with pytest.raises(MissingExtraError, match=r"warcio: not installed: .*stillhouse\[warc\]"):
        list_source(DataSource(path=str(tmp_path)))
