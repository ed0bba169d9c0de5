"""One training on the same documents in every format, from folders, a web server and a data set."""

import functools
import http.server
import io
import json
import threading

import datasets
import lance
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from small import LEARNING, MODEL, Quiet
from warcio.warcwriter import WARCWriter

from stillhouse.jobs.run import run_job
from stillhouse.training.spec import TrainSpec

DOCUMENTS = 40


def texts(prefix):
    return [f"{prefix} document {i} " + "of some words " * 20 for i in range(DOCUMENTS)]


def table(prefix):
    return pa.table({"text": texts(prefix), "id": [f"{prefix}-{i}" for i in range(DOCUMENTS)]})


def write_pages(path):
    data = io.BytesIO()
    writer = WARCWriter(data, gzip=True)
    for i, text in enumerate(texts("warc")):
        content = io.BytesIO(text.encode())
        url = f"http://a.org/{i}"
        record = writer.create_warc_record(
            url, "conversion", content, warc_content_type="text/plain"
        )
        writer.write_record(record)
    path.write_bytes(data.getvalue())


@pytest.fixture
def data(tmp_path, monkeypatch):
    """The paths of seven inputs of 40 documents each."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("lang=en", "web", "hub", "arrow"):
        (tmp_path / name).mkdir()
    pyarrow.csv.write_csv(table("csv"), tmp_path / "lang=en" / "a.csv")
    datasets.Dataset.from_dict({"text": texts("stream")}).save_to_disk(tmp_path / "arrow" / "saved")
    with pa.ipc.new_file(tmp_path / "arrow" / "a.feather", table("file").schema) as file:
        file.write_table(table("file"), max_chunksize=10)
    write_pages(tmp_path / "a.wet.gz")
    lance.write_dataset(table("lance"), tmp_path / "a.lance", max_rows_per_file=15)
    pq.write_table(table("web"), tmp_path / "web" / "a.parquet")
    pq.write_table(table("hub"), tmp_path / "hub" / "train-0.parquet")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "web")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    names = ("lang=en", "arrow", "a.wet.gz", "a.lance")
    yield [
        *(str(tmp_path / name) for name in names),
        f"http://127.0.0.1:{server.server_port}/a.parquet",
        f"hub://{tmp_path}/hub",
    ]
    server.shutdown()
    thread.join()


def test_a_training_on_all_of_them(data, tmp_path, untrained, ray_cluster):
    content = {
        "job": "train",
        "store": str(tmp_path / "store"),
        "data": {"path": data, "columns": {}},
        "sequence_length": 32,
        "tokenizer": untrained["tokenizer"],
        "model": MODEL,
        "train": {"num_tokens": 4 * 8 * 32, **LEARNING},
    }
    run_job(TrainSpec.model_validate(content), Quiet())
    receipts = [json.loads(p.read_text()) for p in tmp_path.glob("store/scans/receipts/*.json")]
    assert sum(receipt["counts"]["documents"] for receipt in receipts) == 7 * DOCUMENTS
    scanned = pa.concat_tables(
        pq.read_table(path, columns=["chars"]) for path in tmp_path.glob("store/scans/parts/*")
    )
    kinds = ("csv", "stream", "file", "warc", "lance", "web", "hub")
    wanted = sum(len(text) for kind in kinds for text in texts(kind))
    assert sum(scanned["chars"].to_pylist()) == wanted
    again = run_job(TrainSpec.model_validate(content | {"name": "again"}), Quiet())
    assert again["work"]["scan"]["reused"] == again["work"]["scan"]["parts"] > 0
