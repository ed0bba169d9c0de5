import json

import pyarrow as pa
import pyarrow.parquet as pq

from stillhouse.text.records import read_records
from stillhouse.text.rows.record import Record


def records(path, wanted=range(10**9), names=("text",), max_chars=1000):
    return list(
        read_records(
            str(path), lambda _: list(names), text="text", max_chars=max_chars, wanted=wanted
        )
    )


def test_records_are_raw(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": 4, "id": null}\n{\n[]\n')
    first, second, third = records(path)
    assert first == Record(0, {"text": 4, "id": None})
    assert (second.row, second.raw) == (1, b"{\n")
    assert third == Record(2, broken="not a JSON object but list", raw=b"[]\n")
    assert records(path, [2]) == [third]


def test_wide_rows_are_decoded_few_at_a_time(tmp_path):
    """60 rows of 2 MB in one row group, all of which a batch of 256 rows would hold at once."""
    texts = [f"{i} " + "a b " * 500_000 for i in range(60)]
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"text": texts, "n": range(60)}), path, use_dictionary=False, write_batch_size=1
    )
    del texts
    before = pa.total_allocated_bytes()
    most = 0
    for row, record in enumerate(
        read_records(str(path), lambda _: ["text"], text="text", max_chars=10)
    ):
        assert record.values["text"].startswith(f"{row} a b ")
        most = max(most, pa.total_allocated_bytes() - before)
    assert row == 59
    assert most < 60 << 20


def test_one_number_a_row_whatever_the_form(tmp_path):
    """Blank lines have numbers; in an array and in indented JSON the values are counted."""
    rows = [{"text": f"t{i}"} for i in range(5)]
    (tmp_path / "a.jsonl").write_text("\n".join(f"{json.dumps(row)}\n" for row in rows))
    assert [r.row for r in records(tmp_path / "a.jsonl")] == [0, 2, 4, 6, 8]
    for indent in (None, 1):
        (tmp_path / "b.json").write_text(json.dumps(rows, indent=indent))
        assert records(tmp_path / "b.json") == [Record(i, row) for i, row in enumerate(rows)]
        assert records(tmp_path / "b.json", [1, 3]) == [Record(1, rows[1]), Record(3, rows[3])]
    (tmp_path / "c.json").write_text("\n".join(json.dumps(row, indent=1) for row in rows))
    assert [r.values for r in records(tmp_path / "c.json", range(2, 4))] == rows[2:4]
