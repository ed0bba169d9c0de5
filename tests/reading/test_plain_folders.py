"""The folder of an artifact whose payload is rows is a Parquet data set to other readers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import duckdb
import fsspec
import pandas as pd
import pyarrow.dataset
import pytest
from selections import NUM_ROWS, put_selection, rows_table
from small import Quiet, about, rows, small_spec, write

import stillhouse
from stillhouse.jobs.run import run_job
from stillhouse.jobs.verify import verify
from stillhouse.spec import SelectSpec
from stillhouse.storage import artifact
from stillhouse.storage.artifact import Store
from stillhouse.storage.filesystem import list_names

KEPT = rows_table(0, NUM_ROWS)


def read_datasets(uri):
    return datasets.load_dataset(uri, split="train").to_pandas()


def read_datasets_parquet(uri):
    return datasets.load_dataset("parquet", data_dir=uri, split="train").to_pandas()


def read_datasets_streaming(uri):
    return pd.DataFrame(list(datasets.load_dataset(uri, split="train", streaming=True)))


def read_pyarrow(uri):
    return pyarrow.dataset.dataset(uri).to_table().to_pandas()


def read_duckdb(uri):
    return duckdb.sql(f"select * from '{uri}/*.parquet'").df()


def read_duckdb_deep(uri):
    """Hidden files too."""
    return duckdb.sql(f"select * from read_parquet('{uri}/**')").df()


READERS = [
    pd.read_parquet,
    read_pyarrow,
    read_datasets,
    read_datasets_parquet,
    read_datasets_streaming,
    read_duckdb,
    read_duckdb_deep,
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(params=[300, 2], ids=["a short list of parts", "a long one"])
def uri(request, tmp_path, monkeypatch):
    monkeypatch.setattr(artifact, "_MAX_INLINE_PARTS", request.param)
    return put_selection(Store(str(tmp_path / "store")))


def same(found, kept=KEPT):
    assert sorted(found.columns) == sorted(kept.column_names)
    found = found.sort_values(["part", "row"])
    for name in ("part", "row", "score"):
        assert found[name].tolist() == kept[name].to_pylist()
    assert [list(ids) for ids in found["input_ids"]] == kept["input_ids"].to_pylist()
    return True


def test_readers_see_the_rows_and_nothing_else(uri, ray_cluster):
    """Also after a writer was killed before its file got a name, unless they read hidden files."""
    import ray.data

    readers = [*READERS, lambda uri: ray.data.read_parquet(uri).to_pandas()]
    for reader in readers:
        assert same(reader(uri))
    code = (
        "import os, sys; from stillhouse.storage.commit import create\n"
        "os.link = lambda *_: os._exit(9)\n"
        f"create({uri + '/part-00003.parquet'!r}, b'PAR1')"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert len(list_names(uri)) == 4
    for reader in (pd.read_parquet, read_pyarrow, read_datasets, read_duckdb):
        assert same(reader(uri))


def test_on_s3(bucket, s3_url):
    """pyarrow and DuckDB over fsspec, pandas by the URI; datasets takes no folder of S3."""
    uri = put_selection(Store(bucket))
    options = {"endpoint_url": s3_url}
    fs = fsspec.filesystem("s3", **options)
    path = uri.removeprefix("s3://")
    assert same(pyarrow.dataset.dataset(path, filesystem=fs).to_table().to_pandas())
    assert same(pd.read_parquet(uri, storage_options=options))
    files = f"{uri}/*"
    found = datasets.load_dataset(
        "parquet", data_files=files, split="train", storage_options=options
    )
    assert same(found.to_pandas())
    with duckdb.connect() as connection:
        connection.register_filesystem(fs)
        assert same(connection.sql(f"select * from '{uri}/*.parquet'").df())


def selections_of(result):
    return [result["artifacts"]["selection"], *result["artifacts"]["controls"].values()]


def test_a_jobs_selections_hold_their_parts_alone(finished):
    """Kept rows are counted by what became of the pool's rows."""
    kept = finished["selection"]["fates"]["kept"]
    for uri in selections_of(finished):
        listed = stillhouse.open_artifact(uri).parts
        assert list_names(uri) == [part.uri.rsplit("/", 1)[-1] for part in listed]
        for reader in READERS:
            found = reader(uri)
            assert len(found) == len(set(zip(found["part"], found["row"], strict=True))) == kept


def test_dead_letters(ray_cluster, untrained, tmp_path):
    """All bad rows of a job: the error names their folder."""
    write(tmp_path / "pool" / "a.parquet", [*rows(1, 40, ["sea", "law"]), {"text": None}])
    write(tmp_path / "target" / "b.parquet", [*rows(2, 30, ["sea"]), {"text": None}, {"text": ""}])
    asked = small_spec(tmp_path, **untrained, selection={"tau": 4})
    asked["pool"]["max_bad_rows"] = asked["target"]["max_bad_rows"] = 5
    letters = run_job(SelectSpec.model_validate(asked), Quiet())["artifacts"]["dead_letters"]
    for reader in READERS:
        found = reader(letters).sort_values(["input", "row"])
        assert found["row"].tolist() == [40, 30, 31]
        assert found["input"].tolist() == ["pool", "target", "target"]


def make_older(folder):
    """The layout of before: the manifest and its files among the rows."""
    for path in about(folder).iterdir():
        shutil.move(path, folder)
    about(folder).rmdir()


def test_a_selection_of_an_older_store_is_read_and_made_again(uri):
    store = Store(uri.rsplit("/", 2)[0])
    make_older(Path(uri))
    assert len(list_names(uri)) > 3
    assert stillhouse.open_selection(uri).to_arrow().read_all().equals(KEPT)
    assert stillhouse.open_selection(f"{store.uri}#mine").num_rows == NUM_ROWS
    assert stillhouse.open_selection(store.path("runs/r")).to_datasets().num_rows == NUM_ROWS
    assert store.find_manifest("selections", "s") is None


def test_an_older_selection_is_verified_published_and_kept_by_prune(finished, tmp_path, reports):
    store = tmp_path / "store"
    shutil.copytree(Path(finished["run"]).parents[1], store)
    folder = store / "selections" / finished["selection_fingerprint"]
    make_older(folder)
    run = str(store / "runs" / Path(finished["run"]).name)
    assert verify(str(folder), 2)["problems"] == verify(run, 2)["problems"] == []
    assert verify(str(store), 0)["problems"] == []
    assert reports("publish", "sea", "--to", str(folder), "--store", str(store))[0] == 0
    for path in store.rglob("*"):
        os.utime(path, (1e9, 1e9))
    before = sorted(folder.iterdir())
    assert reports("prune", str(store), "--yes")[0] == 0
    assert sorted(folder.iterdir()) == before
    assert verify(f"{store}#sea", 2)["problems"] == []
    (folder / "ledger.parquet").unlink()
    assert "ledger.parquet is missing" in verify(str(folder), 0)["problems"][0]
