"""Arrow files, Feather and streams, as other libraries write them; cut by record batches."""

import io

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pytest

from stillhouse.data_settings import ColumnNames, DataSource
from stillhouse.errors import InputError
from stillhouse.pipelines.inputs import list_source, open_inputs, scan_tasks
from stillhouse.storage.artifact import Store
from stillhouse.text.documents import read_documents
from stillhouse.text.records import read_records
from stillhouse.text.rows.arrow import piece_rows
from stillhouse.text.tasks import read_unit

TEXTS = [f"text {i} " + "é" * (i % 50) for i in range(1000)]
TABLE = pa.table(
    {"text": TEXTS, "n": range(1000), "meta": [{"set": f"s{i % 3}"} for i in range(1000)]}
)
NAMED = DataSource(path="unused", columns=ColumnNames(id="n", source="meta.set"))


def write(path, table=TABLE, batch=300, how=pa.ipc.new_file, **options):
    with how(path, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as file:
        file.write_table(table, max_chunksize=batch)
    return path


def read(path, settings=NAMED, rows=range(10**9)):
    return list(read_documents(str(path), file=0, name="n", settings=settings, rows=rows))


@pytest.mark.parametrize("how", [pa.ipc.new_file, pa.ipc.new_stream])
@pytest.mark.parametrize("compression", [None, "zstd", "lz4"])
def test_every_row_and_any_rows(tmp_path, how, compression):
    path = write(tmp_path / "a.arrow", how=how, compression=compression)
    found = read(path)
    assert [(d.row, d.id, d.source, d.text) for d in found] == [
        (i, str(i), f"s{i % 3}", text) for i, text in enumerate(TEXTS)
    ]
    for rows in ([0], [299, 300, 999], range(250, 650), [1000], []):
        assert [d.row for d in read(path, rows=rows)] == [i for i in rows if i < 1000]


def test_files_of_other_libraries(tmp_path):
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    [saved] = list_source(DataSource(path=str(tmp_path / "saved")))
    assert saved.name == "data-00000-of-00001.arrow"
    pd.DataFrame({"text": TEXTS}).to_feather(tmp_path / "pandas.feather")
    dictionary = TABLE.set_column(0, "text", TABLE["text"].dictionary_encode())
    pa.feather.write_feather(dictionary, tmp_path / "dictionary.feather")
    for path in (saved.uri, tmp_path / "pandas.feather", tmp_path / "dictionary.feather"):
        assert [d.text for d in read(path, DataSource(path="unused"))] == TEXTS


def test_rows_of_batches_are_those_that_arrow_counts(tmp_path):
    for batch in (1, 7, 300, 5000):
        path = write(tmp_path / "a.arrow", batch=batch)
        with pa.ipc.open_file(path) as file:
            wanted = [file.get_batch(i).num_rows for i in range(file.num_record_batches)]
        with open(path, "rb") as stream:
            assert piece_rows(stream) == tuple(wanted)
    write(tmp_path / "none.arrow", TABLE.slice(0, 0))
    with open(tmp_path / "none.arrow", "rb") as stream:
        assert sum(piece_rows(stream)) == 0
    assert read(tmp_path / "none.arrow") == []
    write(tmp_path / "stream.arrow", how=pa.ipc.new_stream)
    with open(tmp_path / "stream.arrow", "rb") as stream:
        assert piece_rows(stream) is None
    for damaged in (b"ARROW1", b"ARROW1\0\0" + b"\xff" * 40 + b"ARROW1", b""):
        assert piece_rows(io.BytesIO(damaged)) is None


def test_a_large_file_is_cut_by_its_batches_and_a_stream_is_not(tmp_path):
    """The units together have each row once, in order, however small they are."""
    (tmp_path / "pool").mkdir()
    write(tmp_path / "pool" / "a.arrow")
    write(tmp_path / "pool" / "b.arrow", how=pa.ipc.new_stream)
    source = DataSource(path=str(tmp_path / "pool"))
    store = Store(str(tmp_path / "store"))
    inputs = open_inputs(store, source, list_source(source), 3000)
    ranges = [part for unit in inputs.units for part in unit.ranges]
    assert [(r.file, r.rows) for r in ranges] == [
        (0, (0, 300)),
        (0, (300, 600)),
        (0, (600, 900)),
        (0, (900, 1000)),
        (1, None),
    ]
    found = [d.text for task in scan_tasks(inputs) for d in read_unit(task)]
    assert found == TEXTS * 2


def test_only_the_batches_that_are_wanted_are_read(tmp_path):
    """Of 100 batches of 100 KB one."""
    table = pa.table({"blob": [bytes([i % 256]) * 10_000 for i in range(1000)], "text": TEXTS})
    path = write(tmp_path / "a.arrow", table, batch=10)
    before = pa.total_allocated_bytes()
    records = read_records(str(path), lambda _: ["text"], text="text", max_chars=99, wanted=[995])
    assert next(records).values == {"text": TEXTS[995]}
    assert pa.total_allocated_bytes() - before < 150_000


def test_a_column_that_is_not_there(tmp_path):
    path = write(tmp_path / "a.arrow")
    with pytest.raises(InputError, match=r"no column `meta.sets`.*did you mean `meta.set`"):
        read(path, DataSource(path="unused", columns=ColumnNames(source="meta.sets")))
