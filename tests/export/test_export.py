"""Exports, read back by other readers: NumPy, `datasets`, and ours of the published layouts.

What they must hold is read from the selection's Parquet folder by pyarrow, and from the pool.
"""

import itertools
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import yaml
from fault_proxy import FaultProxy
from small import Quiet, digests, parse

from stillhouse.errors import StorageError
from stillhouse.export.formats import find_format
from stillhouse.export.hub import Hub
from stillhouse.export.shards import Exported, ShardReceipt
from stillhouse.jobs.export import export_selection
from stillhouse.jobs.run import run_job

EVERY_PART = ["--shard-tokens", "1"]
READERS = {
    "mds": "from streaming import StreamingDataset as D; d = D(local=SOURCE, batch_size=1); "
    "rows = [d[i]['tokens'] for i in range(len(d))]",
    "megatron": "from megatron.core.datasets.indexed_dataset import IndexedDataset as D; "
    "pairs = [D(p) for p in open(SOURCE + '/data_args.txt').read().split()[1::2]]; "
    "rows = [d[i] for d in pairs for i in range(len(d))]",
}
"""How the formats' own packages read them."""
MEGATRON_TYPES = {4: np.int32, 8: np.uint16}


@pytest.fixture(scope="module")
def selection(finished):
    return finished["artifacts"]["selection"]


@pytest.fixture(scope="module")
def whole(finished, world):
    """The folder of a selection of whole documents from the same scores."""
    settings = {"grain": "documents", "fraction": 0.3, "exclude_contaminated": False}
    return run_job(parse(world, selection=settings), Quiet())["artifacts"]["selection"]


@pytest.fixture
def export(reports, tmp_path):
    """Exports into a new folder: exit code, what `--json` prints, the folder."""

    def call(uri, form, *options, to=None):
        to = str(to or tmp_path / form)
        code, found = reports("export", uri, "--to", to, "--format", form, *options)
        return code, found, Path(to)

    return call


def kept(folder):
    """The selection's rows, part after part."""
    return pa.concat_tables(pq.read_table(p) for p in sorted(Path(folder).glob("*.parquet")))


def kept_ids(folder):
    return np.array(kept(folder)["input_ids"].to_pylist())


def texts(folder, tokenizer):
    """The text of each kept sequence, by the tokenizers library alone."""
    words = tokenizers.Tokenizer.from_file(str(Path(tokenizer, "tokenizer.json")))
    ids = kept_ids(folder).tolist()
    return [words.decode(row, skip_special_tokens=False) for row in ids]


def read_mds(folder):
    """Samples of all shards in the index, as dictionaries of bytes: by the layout's description."""
    index = json.loads((folder / "index.json").read_text())
    assert index["version"] == 2
    for shard in index["shards"]:
        data = (folder / shard["raw_data"]["basename"]).read_bytes()
        assert len(data) == shard["raw_data"]["bytes"]
        (count,) = struct.unpack_from("<I", data)
        assert count == shard["samples"]
        ends = struct.unpack_from(f"<{count + 1}I", data, 4)
        config = json.loads(data[4 + 4 * (count + 1) : ends[0]])
        assert config == {key: shard[key] for key in config}
        for start, end in itertools.pairwise(ends):
            sample, at = {}, start
            sizes = list(config["column_sizes"])
            for n, size in enumerate(sizes):
                if size is None:
                    (sizes[n],) = struct.unpack_from("<I", data, at)
                    at += 4
            for name, size in zip(config["column_names"], sizes, strict=True):
                sample[name] = data[at : at + size]
                at += size
            assert at == end
            yield sample


def read_megatron(prefix):
    """The documents of one pair of files, by the layout's description."""
    index, data = Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code, sequences, borders = struct.unpack_from("<QBQQ", index, 9)
    assert version == 1
    at = 9 + 25
    lengths = np.frombuffer(index, np.int32, sequences, at)
    pointers = np.frombuffer(index, np.int64, sequences, at + 4 * sequences)
    documents = np.frombuffer(index, np.int64, borders, at + 12 * sequences)
    assert len(index) == at + 12 * sequences + 8 * borders
    kind = np.dtype(MEGATRON_TYPES[code])
    rows = [np.frombuffer(data, kind, n, p) for n, p in zip(lengths, pointers, strict=True)]
    spans = itertools.pairwise(documents)
    return [np.concatenate(rows[start:end]) for start, end in spans]


@pytest.mark.parametrize("files", ["jsonl", "parquet"])
def test_text(export, selection, finished, files):
    code, found, folder = export(selection, "text", "--files", files, *EVERY_PART)
    assert code == 0
    parts = sorted(folder.glob(f"text-*.{files}"))
    assert len(parts) == found["shards"] == len([*Path(selection).glob("*.parquet")]) > 1
    if files == "jsonl":
        lines = (line for part in parts for line in part.read_text().splitlines())
        rows = [json.loads(line) for line in lines]
    else:
        rows = [row for part in parts for row in pq.read_table(part).to_pylist()]
    assert [row["text"] for row in rows] == texts(selection, finished["artifacts"]["tokenizer"])
    assert [row["sample"] for row in rows] == list(range(found["num_samples"]))
    assert [row["score"] for row in rows] == kept(selection)["score"].to_pylist()


def test_tokens(export, selection):
    code, found, folder = export(selection, "tokens", *EVERY_PART)
    arrays = [np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))]
    assert code == 0
    assert {array.dtype for array in arrays} == {np.dtype(np.uint16)}
    np.testing.assert_array_equal(np.concatenate(arrays), kept_ids(selection))
    assert found["num_tokens"] == kept_ids(selection).size
    assert found["vocab_size"] == 400


def test_megatron(export, selection):
    code, found, folder = export(selection, "megatron", *EVERY_PART)
    assert code == 0
    words = (folder / "data_args.txt").read_text().split()
    weights, prefixes = words[::2], words[1::2]
    documents = [read_megatron(prefix) for prefix in prefixes]
    assert [int(weight) for weight in weights] == [len(rows) for rows in documents]
    np.testing.assert_array_equal(np.concatenate(documents), kept_ids(selection))
    assert found["bytes"] == sum(path.stat().st_size for path in folder.glob("shard-*"))


def test_mds(export, selection):
    code, _, folder = export(selection, "mds", *EVERY_PART)
    assert code == 0
    entry = json.loads((folder / "index.json").read_text())["shards"][0]
    assert entry["column_encodings"] == ["ndarray:uint16:32"]
    rows = [np.frombuffer(sample["tokens"], np.uint16) for sample in read_mds(folder)]
    np.testing.assert_array_equal(rows, kept_ids(selection))


def test_hub(export, selection, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    code, found, folder = export(selection, "hub", *EVERY_PART)
    rows = datasets.load_dataset(str(folder), split="train")
    assert code == 0
    assert rows["text"] == texts(selection, finished["artifacts"]["tokenizer"])
    assert len(rows) == found["num_samples"]
    card = (folder / "README.md").read_text()
    assert f"{len(rows):,} sequences" in card
    assert yaml.safe_load(card.split("---")[1])["size_categories"] == ["n<1K"]


@pytest.mark.parametrize(
    ("samples", "category"),
    [(1, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (99_999, "10K<n<100K"), (10**12, "n>1T")],
)
def test_size_categories(samples, category):
    receipt = ShardReceipt(0, samples, 0, {}, {}, {})
    source = Exported("", "", "", "sequences", 1, 1, "", None, {})
    card = Hub().finish(source, "", [receipt])["README.md"].decode()
    assert yaml.safe_load(card.split("---")[1])["size_categories"] == [category]


def test_documents(export, whole, world):
    """Whole documents are text: their own, whatever the format."""
    pool = {row["id"]: row for p in world.glob("pool/*") for row in pq.read_table(p).to_pylist()}
    code, _, folder = export(whole, "text")
    rows = [json.loads(line) for line in (folder / "text-00000.jsonl").read_text().splitlines()]
    assert code == 0
    assert [row["id"] for row in rows] == kept(whole)["id"].to_pylist()
    for row in rows:
        assert (row["text"], row["source"]) == (pool[row["id"]]["text"], pool[row["id"]]["source"])
    code, _, folder = export(whole, "mds")
    samples = [(s["id"].decode(), s["text"].decode()) for s in read_mds(folder)]
    assert samples == [(row["id"], row["text"]) for row in rows]
    origin = pq.read_table(folder / "provenance" / "00000.parquet").to_pylist()
    for row, place in zip(rows, origin, strict=True):
        raw = pq.read_table(place["raw_file"]).to_pylist()[place["raw_row"]]
        assert raw["text"] == row["text"]


def test_every_sample_leads_to_its_raw_rows(export, selection, finished):
    _, found, folder = export(selection, "tokens", *EVERY_PART)
    words = tokenizers.Tokenizer.from_file(
        str(Path(finished["artifacts"]["tokenizer"], "tokenizer.json"))
    )
    origin = [
        row
        for path in sorted(folder.glob("provenance/*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]
    assert [row["sample"] for row in origin] == list(range(found["num_samples"]))
    for row, ids in zip(origin, kept_ids(selection), strict=True):
        for piece in row["documents"]:
            raw = pq.read_table(piece["file"]).to_pylist()[piece["row"]]
            assert raw["id"] == piece["id"]
            text = words.decode(ids[piece["start"] : piece["end"]], skip_special_tokens=True)
            assert text in raw["text"]


def test_again(export, selection):
    """A second time nothing is written; a shard that lost a file is made again, as it was."""
    _, first, folder = export(selection, "megatron", *EVERY_PART)
    before = digests(folder)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    code, again, _ = export(selection, "megatron", *EVERY_PART)
    assert (code, first["reused"], again["reused"]) == (0, 0, first["shards"])
    assert times == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    (folder / "shard-00001.bin").unlink()
    code, again, _ = export(selection, "megatron", *EVERY_PART)
    assert (code, again["reused"]) == (0, first["shards"] - 1)
    assert digests(folder) == before


def test_in_tasks(selection, ray_cluster, tmp_path):
    """On a cluster the same bytes."""
    here, there = str(tmp_path / "here"), str(tmp_path / "there")
    form = find_format("mds", None)
    export_selection(selection, here, form, Quiet(), 1)
    export_selection(selection, there, form, Quiet(), 1, large_bytes=0)
    assert digests(here) == digests(there)


def test_killed_in_the_middle_on_s3(selection, s3_server, bucket, tmp_path):
    """The second run writes the shards that the first had not, and all is as without a kill."""
    arguments = ["export", selection, "--format", "tokens", *EVERY_PART]
    command = [str(Path(sys.executable).with_name("stillhouse")), *arguments, "--json", "--to"]
    puts = []

    def kill(n, method, path):
        if method in {"PUT", "POST"} and "provenance/" in path and path.endswith(".json"):
            puts.append(path)
            if len(puts) == 2:
                os.kill(process.pid, signal.SIGKILL)
                return "reset"
        return None

    with FaultProxy(s3_server, kill) as proxy:
        environment = os.environ | {"AWS_ENDPOINT_URL": proxy.url}
        process = subprocess.Popen([*command, f"{bucket}/a"], env=environment)
        assert process.wait(120) == -signal.SIGKILL
    done = subprocess.run([*command, f"{bucket}/a"], capture_output=True, check=True, text=True)
    found = json.loads(done.stdout)
    assert found["reused"] == 1
    plain = subprocess.run([*command, f"{bucket}/b"], capture_output=True, check=True, text=True)
    assert found["files"] == json.loads(plain.stdout)["files"]


def test_what_is_refused(export, selection, whole, finished, tmp_path):
    def said(uri, form, *options, to=None):
        code, found, _ = export(uri, form, *options, to=to)
        return code, found["error"]

    code, message = said(whole, "megatron")
    assert code == 2 and "whole documents" in message and "--format text" in message
    code, message = said(selection, "tokens", "--files", "parquet")
    assert code == 2 and "--files" in message
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    code, message = said(selection, "tokens", to=other)
    assert code == 2 and "notes.txt" in message
    assert [path.name for path in other.iterdir()] == ["notes.txt"]
    assert export(selection, "tokens", to=tmp_path / "tokens")[0] == 0
    code, message = said(selection, "mds", to=tmp_path / "tokens")
    assert code == 2 and "another export" in message
    code, message = said(selection, "tokens", to=Path(selection).parent / "mine")
    assert code == 2 and "in the store" in message
    code, message = said(finished["artifacts"]["prior"], "text")
    assert code == 3


def test_a_tokenizer_that_is_gone(export, finished, tmp_path):
    """Text needs it, tokens do not."""
    store = Path(finished["run"]).parent.parent
    copied = tmp_path / "store"
    shutil.copytree(store, copied)
    shutil.rmtree(copied / Path(finished["artifacts"]["tokenizer"]).relative_to(store))
    moved = str(copied / Path(finished["artifacts"]["selection"]).relative_to(store))
    code, found, _ = export(moved, "text")
    assert code == 3
    assert "selection.text: true" in found["error"]
    assert export(moved, "tokens")[0] == 0


def test_workers_that_write_elsewhere(selection, ray_cluster, tmp_path, monkeypatch):
    """A folder of another machine: the shards are not to be seen here."""
    from stillhouse.jobs import export as module

    monkeypatch.setattr(module, "finished_shards", lambda to: {})
    form = find_format("tokens", None)
    with pytest.raises(StorageError, match="shared folder"):
        export_selection(selection, str(tmp_path / "x"), form, Quiet(), large_bytes=0)


@pytest.fixture(scope="module")
def their_python(tmp_path_factory):
    """A Python with the formats' own packages, which want older versions than we do.

    `STILLHOUSE_READERS` names one that has them; else they are installed (minutes).
    """
    if "STILLHOUSE_READERS" in os.environ:
        return os.environ["STILLHOUSE_READERS"]
    folder = tmp_path_factory.mktemp("readers")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    install = [folder / "bin" / "python", "-m", "pip", "install", "-q"]
    subprocess.run([*install, "mosaicml-streaming==0.13.0"], check=True)
    subprocess.run([*install, "--no-deps", "megatron-core==0.16.1"], check=True)
    return str(install[0])


@pytest.mark.soak
@pytest.mark.parametrize("form", READERS)
def test_their_own_readers(export, selection, their_python, tmp_path, form):
    _, _, folder = export(selection, form, *EVERY_PART)
    code = f"import numpy; SOURCE, TO = {str(folder)!r}, {str(tmp_path / 'rows.npy')!r}; "
    code += f"{READERS[form]}; numpy.save(TO, numpy.stack(rows))"
    subprocess.run([their_python, "-c", code], check=True, capture_output=True)
    np.testing.assert_array_equal(np.load(tmp_path / "rows.npy"), kept_ids(selection))
