"""From listed files to units: what their names say, and what of it is identity."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillhouse.data_settings import ColumnNames, DataSource
from stillhouse.errors import InputError
from stillhouse.pipelines.inputs import (
    auto_part_tokens,
    list_source,
    open_inputs,
    scan_tasks,
)
from stillhouse.pipelines.mix_data import list_documents
from stillhouse.storage.artifact import Store
from stillhouse.text.tasks import read_unit


def put(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": texts}), path)
    else:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def opened(folder, path, **settings):
    source = DataSource(path=str(path), **settings)
    return open_inputs(Store(str(folder / "store")), source, list_source(source), 1000)


def sources(inputs):
    """Text and label of every document, as the scan reads them."""
    return sorted((d.text, d.source) for task in scan_tasks(inputs) for d in read_unit(task))


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_folders_that_say_the_source(tmp_path, suffix):
    """Hive partitions: escaped values, the null partition, other keys, deeper folders."""
    pool = tmp_path / "pool"
    put(pool / "source=web" / f"a{suffix}", ["one"])
    put(pool / "lang=en" / "source=my%20books" / "part=1" / f"b{suffix}", ["two"])
    put(pool / "source=__HIVE_DEFAULT_PARTITION__" / f"c{suffix}", ["three"])
    put(pool / f"source=d{suffix}", ["four"])
    wanted = [("four", "unknown"), ("one", "web"), ("three", "unknown"), ("two", "my books")]
    assert sources(opened(tmp_path, pool)) == wanted
    assert sources(opened(tmp_path, pool / "source=web")) == [("one", "web")]
    assert sources(opened(tmp_path, f"{pool}/source=w*/*{suffix}")) == [("one", "web")]
    other = opened(tmp_path, pool, source="mine")
    assert ("four", "mine") in sources(other) and ("one", "web") in sources(other)


def test_folders_that_say_a_named_column(tmp_path):
    """Where the spec names the column, its folders are what is read."""
    pool = tmp_path / "pool"
    put(pool / "domain=a" / "source=no" / "x.parquet", ["one"])
    put(pool / "domain=b" / "y.jsonl", ["two"])
    named = opened(tmp_path, pool, columns=ColumnNames(source="domain"))
    assert sources(named) == [("one", "a"), ("two", "b")]


def test_the_label_is_part_of_a_units_identity(tmp_path):
    """The same bytes under another folder are other documents; without a label, nothing changes."""
    for folder in ("x/source=a", "y/source=b", "z/plain", "z/renamed"):
        put(tmp_path / folder / "f.jsonl", ["one"])
    a, b, plain, renamed = (
        opened(tmp_path, tmp_path / folder)
        for folder in ("x/source=a", "y/source=b", "z/plain", "z/renamed")
    )
    names = [[task.fingerprint for task in scan_tasks(i)] for i in (a, b, plain, renamed)]
    assert names[0] != names[1] != names[2] == names[3]
    identities = [i.identity() for i in (a, b, plain, renamed)]
    assert len(set(identities)) == 3 and identities[2] == identities[3]


def test_text_is_no_data_beside_data(tmp_path):
    """For documents and for arms: a README beside Parquet is not read, alone it is."""
    put(tmp_path / "pool" / "a.parquet", ["one"])
    (tmp_path / "pool" / "README.md").write_text("about the pool")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "README.md").write_text("a note")
    assert [f.name for f in list_documents([str(tmp_path / "pool")])] == ["a.parquet"]
    assert [f.name for f in list_documents([str(tmp_path / "notes")])] == ["README.md"]
    with pytest.raises(InputError, match=r"looking for \.parquet, \.pq, \.jsonl"):
        list_documents([str(tmp_path / "nothing")])


@pytest.mark.parametrize(
    ("num_bytes", "expected"),
    [
        (1, 131_072),
        (40e6, 131_072),  # 10 M tokens: 76 parts
        (4e9, 16_777_216),  # 1 G tokens: 60 parts
        (4 * 64 * 2**20, 2**20),
        (1e15, 16_777_216),
    ],
)
def test_parts_follow_from_bytes_alone(num_bytes, expected):
    assert auto_part_tokens(num_bytes) == expected


def test_the_first_listing_decides_and_a_plan_pins_nothing(tmp_path):
    """A pool that grows thousandfold keeps its parts: those that are finished are found again."""
    pool, store = tmp_path / "pool", Store(str(tmp_path / "store"))
    pool.mkdir()
    (pool / "a.txt").write_text("word " * 1000)
    source = DataSource(path=str(pool))

    def part_tokens(**options):
        return open_inputs(store, source, list_source(source), "auto", **options).part_tokens

    assert part_tokens(remember=False) == 131_072
    os.truncate(pool / "a.txt", 10**9)  # sparse; 2.5e8 tokens in 64 parts are 3.9 M each
    assert part_tokens(remember=False) == 2**22
    os.truncate(pool / "a.txt", 5000)
    assert part_tokens() == 131_072
    os.truncate(pool / "a.txt", 10**8 * 4)
    assert part_tokens() == part_tokens(remember=False) == 131_072
