import os
import subprocess
import sys

import datasets
import pyarrow as pa
import pytest
from selections import NUM_ROWS, SIZES, put_selection, rows_table

import stillhouse
from stillhouse.errors import ArtifactError, StorageError
from stillhouse.reading.readers import open_artifact, open_selection
from stillhouse.storage.artifact import Manifest, Store

WHOLE = rows_table(0, NUM_ROWS)


@pytest.fixture
def uri(store):
    return put_selection(store)


def test_artifact(store, uri):
    selection = open_selection(uri)
    assert selection.threshold == -20.0
    assert selection.sources == {"web": {"pool_tokens": 88, "kept_tokens": 84}}
    assert repr(selection) == f"Selection({uri!r}, rows=21, tokens=84, parts=3)"
    found = open_artifact(uri)
    assert [part.uri for part in found.parts] == [f"{uri}/part-0000{i}.parquet" for i in range(3)]
    assert [part.num_rows for part in found.parts] == list(SIZES)
    assert (found.num_rows, found.num_tokens) == (21, 84)
    assert open_artifact(store.path("tokens", "t")).manifest.kind == "tokens"


def test_selection_by_each_of_its_names(store, uri):
    for name in (uri, uri + "/", store.path("runs/r"), f"{store.uri}#mine"):
        selection = open_selection(name)
        assert (selection.uri, selection.num_rows) == (uri, 21)
    assert stillhouse.open_selection(uri).uri == uri


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("/tokens/t", "holds `tokens` where `selections` is needed"),
        ("/selections/x", "no artifact at .*/selections/x: there is no manifest.json"),
        ("/runs/unfinished", "the run is not finished .see `stillhouse status"),
        ("/runs/x", "no run .see `stillhouse status"),
        ("#yours", "nothing is published under 'yours' in "),
    ],
)
def test_what_is_no_selection(store, uri, name, sentence):
    with pytest.raises(ArtifactError, match=sentence):
        open_selection(store.uri + name)


def test_to_arrow(uri):
    reader = open_selection(uri).to_arrow()
    assert isinstance(reader, pa.RecordBatchReader)
    assert reader.schema == WHOLE.schema
    batches = list(reader)
    assert [len(batch) for batch in batches] == [3, 3, 3, 1, 3, 3, 1, 3, 1]
    assert pa.Table.from_batches(batches).equals(WHOLE)
    some = open_selection(uri).to_arrow(["score", "row"]).read_all()
    assert some.equals(WHOLE.select(["score", "row"]))
    with pytest.raises(KeyError, match="nothing"):
        open_selection(uri).to_arrow(["nothing"])


def test_empty_selection(store):
    store.put_manifest(Manifest("selections", "e", (), {"tokens": "t"}, {}))
    with pytest.raises(ArtifactError, match="selections/e is empty: it has no parts"):
        open_selection(store.path("selections/e")).to_arrow()


def test_local_uris(tmp_path, monkeypatch):
    """Characters that mean something to others are taken literally."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    uri = put_selection(Store(str(tmp_path / "run #3 a[1]*b" / "store")))
    assert open_selection("file://" + uri).num_rows == 21
    assert open_selection(uri).to_datasets().num_rows == 21
    monkeypatch.chdir(tmp_path / "run #3 a[1]*b")
    for name in ("store/selections/s", "store/runs/r", "./store#mine"):
        assert open_selection(name).uri == uri


def test_to_datasets(uri, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    plain = open_selection(uri).to_datasets()
    assert isinstance(plain, datasets.Dataset)
    assert plain.column_names == WHOLE.column_names
    assert plain["input_ids"][:] == WHOLE["input_ids"].to_pylist()
    streamed = open_selection(uri).to_datasets(streaming=True)
    assert isinstance(streamed, datasets.IterableDataset)
    assert [row["row"] for row in streamed] == list(range(21))


def test_datasets_is_given_the_storage_options(bucket, proxied, monkeypatch):
    uri = put_selection(Store(bucket))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert len(list(open_selection(uri).to_datasets(streaming=True))) == 21


def test_provenance(uri):
    selection = open_selection(uri)
    piece = {"id": "d12", "source": "web", "start": 0, "end": 4, "row": 12}
    assert selection.provenance(12) == {
        "documents": [piece | {"file": "/pool/10.jsonl"}],
        "score": -12.0,
        "prior_nll": 6.0,
        "conditional_nll": 18.0,
        "part": 1,
        "row": 12,
        "token_part": "tokens/parts/1.parquet",
    }
    assert selection.provenance(20)["row"] == 20
    for row in (-1, 21):
        with pytest.raises(IndexError, match=f"row {row} of a selection that has 21"):
            selection.provenance(row)


def test_provenance_of_whole_documents(store, uri):
    table = pa.table({"text": ["a"], "raw_file": [1], "raw_row": [7], "part": [0], "row": [3]})
    part = store.put_part("selections/d/part-00000.parquet", table, num_tokens=1)
    store.put_manifest(Manifest("selections", "d", (part,), {"tokens": "t"}, {}))
    found = open_selection(store.path("selections/d")).provenance(0)
    assert (found["raw_file"], found["raw_row"]) == ("/pool/01.jsonl", 7)


WITHOUT_RAY = """
import sys
class NoRay:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] == 'ray':
            raise ImportError('no ray here')
sys.meta_path.insert(0, NoRay())
import stillhouse
selection = stillhouse.open_selection({uri!r})
rows = selection.to_arrow().read_all().num_rows
batches = [b['input_ids'].shape for b in selection.to_torch(batch_size=16)]
print(rows, [tuple(b) for b in batches], len(list(selection.to_datasets(streaming=True))))
"""


def test_no_ray_is_needed(uri):
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    code = WITHOUT_RAY.format(uri=uri)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout == "21 [(16, 4), (5, 4)] 21\n", done.stderr


def test_requests(bucket, proxied):
    uri = put_selection(Store(bucket))
    proxied.requests.clear()
    selection = open_selection(uri)
    assert len(proxied.requests) == 1
    list(selection.to_torch())
    assert len(proxied.requests) == 1 + 2 * 3  # size and bytes of each part
    proxied.rule = lambda *_: "403"
    with pytest.raises(StorageError, match="no access"):
        open_selection(uri)
