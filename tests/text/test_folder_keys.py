"""Hive partitions as columns: carried along, as conditions of arms, and what of it is identity."""

import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from stillhouse.errors import InputError, SpecError
from stillhouse.mixing.preparation import Example, read_examples
from stillhouse.mixing.spec import ArmSource
from stillhouse.pipelines.inputs import list_documents, list_source, open_inputs
from stillhouse.pipelines.mix_data import Source, _row_digests
from stillhouse.selection.carried import check_columns, raw_rows
from stillhouse.spec import PoolSource
from stillhouse.storage.artifact import Store
from stillhouse.text.values import column_of

SUFFIXES = pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv", ".arrow", ".txt"])


def put(path, columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".arrow":
        with pa.ipc.new_file(path, table.schema) as file:
            file.write_table(table)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    elif path.suffix == ".csv":
        rows = [table.column_names, *zip(*table.to_pydict().values(), strict=True)]
        path.write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
    else:
        path.write_text(columns["text"][0])
    return str(path)


def carried(uri, *names):
    pool = PoolSource(path=uri, keep_columns=list(names))

    def choose(schema):
        return [name for name in names if column_of(schema, name) is not None]

    rows = raw_rows(uri, pool, choose, range(100))
    return [{name: row.values.get(name) for name in names} for row in rows]


@SUFFIXES
def test_they_are_columns_of_every_row_and_win_over_the_files(tmp_path, suffix):
    folder = tmp_path / "lang=en" / "day=2024-01-01" / "empty=__HIVE_DEFAULT_PARTITION__"
    uri = put(folder / f"a{suffix}", {"text": ["one"], "lang": ["fr"], "n": [1]})
    [row] = carried(uri, "lang", "day", "empty", "n")
    assert (row["lang"], row["day"], row["empty"]) == ("en", "2024-01-01", None)
    assert row["n"] in ({1, "1"} if suffix != ".txt" else {None})
    check_columns(PoolSource(path=uri, keep_columns=["lang", "day", "empty"]), [uri])
    with pytest.raises(SpecError, match=r"has `language`; there are: .*lang.*day, empty"):
        check_columns(PoolSource(path=uri, keep_columns=["language"]), [uri])


def test_they_are_what_arrow_reads(tmp_path):
    for lang, texts in {"en": ["one", "two"], "zh-Hans": ["three"]}.items():
        put(tmp_path / f"lang={lang}" / "a.parquet", {"text": texts})
    table = pyarrow.dataset.dataset(tmp_path, partitioning="hive").to_table()
    found = [row for f in list_documents([str(tmp_path)]) for row in carried(f.uri, "text", "lang")]
    assert found == table.select(["text", "lang"]).to_pylist()


def test_where_no_one_names_them_nothing_changes(tmp_path):
    uri = put(tmp_path / "text=no" / "id=5" / "a.jsonl", {"text": ["one"], "id": ["x"]})
    assert carried(uri, "n") == [{"n": None}]
    assert [row.values for row in raw_rows(uri, PoolSource(path=uri), lambda _: [], [0])] == [
        {"text": "one", "id": "x"}
    ]


def test_carried_keys_are_identity_and_others_are_not(tmp_path):
    def identity(folder, *names):
        source = PoolSource(path=str(tmp_path / folder), keep_columns=list(names))
        store = Store(str(tmp_path / "store"))
        return open_inputs(store, source, list_source(source), 1000).identity()

    for folder in ("a/lang=en", "b/lang=de", "c/plain"):
        put(tmp_path / folder / "a.jsonl", {"text": ["one"]})
    assert identity("a", "text") == identity("b", "text") == identity("c", "text")
    assert len({identity("a", "lang"), identity("b", "lang"), identity("c")}) == 3


@SUFFIXES
def test_arms_by_folders(tmp_path, suffix):
    uri = put(tmp_path / "task=sums" / "split=dev" / f"a{suffix}", {"text": ["one"]})
    wanted = Example("", "one", split="dev", group="sums")
    assert list(read_examples(uri, where={"split": "dev"}, by="task")) == [wanted]
    assert list(read_examples(uri, where={"split": "test"})) == []
    with pytest.raises(InputError, match="tasks"):
        list(read_examples(uri, where={}, by="tasks"))


def test_the_folders_of_arms_are_identity_where_they_are_named():
    plain = Source(ArmSource(path="x"), uris=("/p/task=a/f.jsonl",), digests=("d",))
    assert _row_digests(plain) == ("d",)
    by = replace(plain, settings=ArmSource(path="x", by="task"))
    other = replace(by, uris=("/p/task=b/f.jsonl",))
    assert len({_row_digests(plain), _row_digests(by), _row_digests(other)}) == 3
