"""Lance data sets: rows and columns as Lance reads them, by fragment, at one version."""

from datetime import timedelta

import lance
import pyarrow as pa
import pytest

from stillhouse import errors
from stillhouse.data_settings import ColumnNames, DataSource
from stillhouse.errors import InputError, MissingExtraError
from stillhouse.pipelines.inputs import list_source, open_inputs, scan_tasks
from stillhouse.selection.carried import check_columns, raw_rows
from stillhouse.spec import PoolSource
from stillhouse.storage.artifact import Store
from stillhouse.text.documents import read_documents
from stillhouse.text.tasks import read_unit

NUM_ROWS = 1000


def rows(count=NUM_ROWS, start=0):
    numbers = range(start, start + count)
    return pa.table(
        {
            "text": [f"text {i}" for i in numbers],
            "meta": [{"set": f"s{i % 3}", "vector": [float(i)] * 8} for i in numbers],
        }
    )


@pytest.fixture
def path(tmp_path):
    lance.write_dataset(rows(), tmp_path / "pool" / "a.lance", max_rows_per_file=300)
    return str(tmp_path / "pool" / "a.lance")


def opened(path, tmp_path, **settings):
    source = DataSource(path=path, columns=ColumnNames(source="meta.set"), **settings)
    return open_inputs(Store(str(tmp_path / "store")), source, list_source(source), 1000)


def read(inputs):
    return [(d.source, d.text) for task in scan_tasks(inputs) for d in read_unit(task)]


WANTED = [(f"s{i % 3}", f"text {i}") for i in range(NUM_ROWS)]


def test_every_row_by_fragments(path, tmp_path):
    inputs = opened(path, tmp_path)
    assert [file.name for file in inputs.files] == [f"a.lance/{i:08d}" for i in range(4)]
    assert len(inputs.units) > 1
    assert read(inputs) == WANTED


def test_any_rows_of_a_fragment(path):
    plain = DataSource(path=path)
    second = list_source(plain)[1].uri
    for wanted in ([0], [255, 256, 299], range(100, 200), [299], [300], []):
        found = read_documents(second, file=0, name="n", settings=plain, rows=wanted)
        assert [(d.row, d.text) for d in found] == [
            (i, f"text {300 + i}") for i in wanted if i < 300
        ]


def test_a_listing_keeps_its_version_and_finished_fragments_their_names(path, tmp_path):
    before = opened(path, tmp_path)
    names = [file.digest for file in before.files]
    lance.dataset(path).delete("text = 'text 5'")
    lance.write_dataset(rows(50, NUM_ROWS), path, mode="append")
    assert read(before) == WANTED
    after = opened(path, tmp_path)
    assert [file.digest for file in after.files][1:4] == names[1:]
    assert after.files[0].digest != names[0]
    table = lance.dataset(path).to_table(columns=["text"])
    assert [text for _, text in read(after)] == table["text"].to_pylist()
    assert len(read(after)) == NUM_ROWS - 1 + 50


def test_columns_that_are_carried(path):
    [first, *_] = list_source(DataSource(path=path))
    pool = PoolSource(path=path, keep_columns=["meta.set"])
    check_columns(pool, [first.uri])
    found = raw_rows(first.uri, pool, lambda _: ["meta.set"], [7])
    assert [row.values for row in found] == [{"meta.set": "s1"}]
    wrong = DataSource(path=path, columns=ColumnNames(text="meta.body"))
    with pytest.raises(InputError, match=r"no column `meta.body`.* It has text, meta.set, meta.v"):
        list(read_documents(first.uri, file=0, name="n", settings=wrong))


def test_what_is_no_data_set(tmp_path, path, monkeypatch):
    with pytest.raises(InputError, match=r"b\.lance: no Lance data set"):
        list_source(DataSource(path=str(tmp_path / "b.lance")))
    [first, *_] = list_source(DataSource(path=path))
    lance.dataset(path).delete("true")
    lance.dataset(path).cleanup_old_versions(timedelta(0))
    with pytest.raises(InputError, match="its version 1 is no longer there, run again"):
        list(read_documents(first.uri, file=0, name="n", settings=DataSource(path=path)))
    monkeypatch.setattr(errors, "find_spec", lambda module: None)
    with pytest.raises(MissingExtraError, match=r"stillhouse\[lance\]"):
        list_source(DataSource(path=path))
