"""Long texts in Parquet, value by value: against pyarrow, in little memory, and broken pages."""

import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillhouse.errors import BadFileError
from stillhouse.storage.parquet import open_parquet
from stillhouse.text.records import read_records
from stillhouse.text.rows import wide_columns
from stillhouse.text.rows.wide_columns import TooLong, wide_column, wide_values

TEXTS = ["short", "x" * 3000, None, "", "ü" * 900, None, None, *["y" * 40] * 20, "z" * 5000, None]
CODECS = ["zstd", "gzip", "brotli", "none"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Whatever is above 10 bytes a value counts as wide."""
    monkeypatch.setattr(wide_columns, "_WIDE_VALUE", 10)
    monkeypatch.setattr(wide_columns, "_WIDE_CHUNK", 10)


def write(path, texts, **options):
    table = pa.table({"id": [f"r{i}" for i in range(len(texts))], "text": texts})
    options = {"use_dictionary": False, "compression": "zstd", "row_group_size": 17} | options
    pq.write_table(table, path, **options)
    return str(path)


def values(path, max_bytes=10_000):
    with open(path, "rb") as stream, open_parquet(stream) as parquet:
        for group in range(parquet.num_row_groups):
            index = wide_column(parquet, group, "text")
            assert index == 1
            yield from wide_values(stream, parquet, group, index, max_bytes)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("texts", [TEXTS, [t for t in TEXTS if t], [*[None] * 30, "w" * 2000]])
def test_values_are_those_of_pyarrow(tmp_path, codec, version, texts):
    path = write(
        tmp_path / "x.parquet",
        texts,
        compression=codec,
        data_page_version=version,
        data_page_size=500,
        write_page_checksum=True,
    )
    expected = [None if t is None else t.encode() for t in texts]
    if texts[0] is not None:  # else the first group has no values, and is not wide
        assert [*values(path)] == expected
        short = [*values(path, max_bytes=100)]
        for value, whole in zip(short, expected, strict=True):
            too_long = whole is not None and len(whole) > 100
            assert value == (TooLong(whole[:1024]) if too_long else whole)
    rows = [*read_records(path, lambda s: s.names, text="text", max_chars=10_000)]
    found = [(r.row, r.values["id"], r.values["text"]) for r in rows]
    found = [(n, i, t.decode() if isinstance(t, bytes) else t) for n, i, t in found]
    assert found == [(i, f"r{i}", text) for i, text in enumerate(texts)]


def test_rows_that_are_wanted_and_rows_that_are_too_long(tmp_path):
    path = write(tmp_path / "x.parquet", TEXTS)
    rows = [*read_records(path, lambda _: ["text"], text="text", max_chars=200, wanted=[1, 4, 20])]
    assert [row.row for row in rows] == [1, 4, 20]
    assert rows[0].broken == "longer than 200 characters"
    assert rows[0].raw == b"x" * 1024
    assert rows[1].broken is not None and rows[2].values == {"text": b"y" * 40}


def test_a_flipped_bit_is_noticed(tmp_path):
    path = write(tmp_path / "x.parquet", TEXTS, compression="none", write_page_checksum=True)
    content = bytearray((tmp_path / "x.parquet").read_bytes())
    content[content.index(b"zzzz") + 9] ^= 1
    (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(BadFileError, match="another checksum"):
        [*values(path)]


def test_dictionaries_and_nested_columns_are_left_to_pyarrow(tmp_path):
    write(tmp_path / "x.parquet", TEXTS, use_dictionary=True)
    nested = pa.table({"a": [{"text": "x" * 3000}] * 3})
    pq.write_table(nested, tmp_path / "y.parquet", use_dictionary=False)
    for name, column in (("x", "text"), ("y", "a.text"), ("y", "text")):
        with open(tmp_path / f"{name}.parquet", "rb") as stream, open_parquet(stream) as parquet:
            if (name, column) != ("y", "a.text"):
                assert wide_column(parquet, 0, column) is None


def test_a_page_of_half_a_gigabyte_takes_little_memory(tmp_path):
    path = tmp_path / "x.parquet"
    texts = [f"{i} " + "a b " * 2_000_000 for i in range(60)]
    pq.write_table(pa.table({"text": texts}), path, use_dictionary=False, compression="zstd")
    del texts
    script = (
        "import resource, sys\n"
        "from stillhouse.text.records import read_records\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "before = peak()\n"
        "rows = read_records(sys.argv[1], lambda s: s.names, text='text', max_chars=1_000_000)\n"
        "print(sum(row.broken is not None for row in rows), peak() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True
    )
    broken, more_mb = map(int, done.stdout.split())
    assert broken == 60 and more_mb < 150
