"""A reader that is not ours, in examples/extend/: scanned, sampled, and through a whole job."""

import gzip
import json
import shutil
import sys
from pathlib import Path

import cloudpickle
import pytest
from small import LEARNING, MODEL, Quiet

from stillhouse.data_settings import DataSource
from stillhouse.errors import BadFileError, CustomCodeError, SpecError
from stillhouse.jobs.run import run_job
from stillhouse.jobs.submit import own_code
from stillhouse.mixing.preparation import Example, read_examples
from stillhouse.mixing.spec import TargetTask
from stillhouse.pipelines.inputs import list_source
from stillhouse.selection.carried import check_columns
from stillhouse.spec import PoolSource
from stillhouse.storage.artifact import Store
from stillhouse.text.documents import Document, read_documents
from stillhouse.text.tasks import ScanTask, UnitFile
from stillhouse.training.spec import TrainSpec

EXTEND = Path(__file__).parents[2] / "examples" / "extend"
NAME = "wet_reader:WetReader"
PAGES = {
    "https://a.org/1": "One page.",
    "https://b.org/x?y": "Zwei, größer.",
    "https://a.org/2": "3",
}

BAD = """class R:
    suffixes = [".wet.gz"]
    def read(self, file):
        yield "x"
        yield {}["y"]
"""


def record(kind: str, url: str, body: bytes) -> bytes:
    head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {url}\r\nContent-Length: {len(body)}"
    return gzip.compress(f"{head}\r\n\r\n".encode() + body + b"\r\n\r\n")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's folder with the reader, and a crawl of one file beside one that is not read."""
    shutil.copy(EXTEND / "wet_reader.py", tmp_path)
    pages = [record("conversion", url, text.encode()) for url, text in PAGES.items()]
    (tmp_path / "crawl").mkdir()
    info = record("warcinfo", "", b"software: none")
    (tmp_path / "crawl" / "0.warc.wet.gz").write_bytes(info + b"".join(pages))
    (tmp_path / "crawl" / "0.warc.gz").write_bytes(b"not text")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("wet_reader", "bad_reader"):
        sys.modules.pop(name, None)


def source(**changes):
    columns = {"id": "url", "source": "domain"}
    return DataSource.model_validate(
        {"path": "crawl", "format": NAME, "columns": columns} | changes
    )


def read(settings):
    (file,) = list_source(settings)
    return list(read_documents(file.uri, file=0, name=file.name, settings=settings))


def test_pages_become_documents(folder):
    found = [(d.row, d.id, d.source, d.text) for d in read(source()) if isinstance(d, Document)]
    domains = ["a.org", "b.org", "a.org"]
    assert found == [
        (i, *p) for i, p in enumerate(zip(PAGES, domains, PAGES.values(), strict=True))
    ]
    check_columns(
        PoolSource(**source().model_dump(), keep_columns=["domain"]),
        [str(folder / "crawl/0.warc.wet.gz")],
    )
    task = TargetTask(path="crawl", format=NAME)
    uri = str(folder / "crawl" / "0.warc.wet.gz")
    rows = list(read_examples(uri, where={"domain": "b.org"}, reader=task.reader))
    assert rows == [Example("", "Zwei, größer.")]


def test_workers_have_the_code_and_it_is_part_of_the_identity(folder, monkeypatch):
    task = ScanTask((UnitFile(str(folder / "crawl/0.warc.wet.gz"), "0" * 64, None),), source())
    before, sent = task.fingerprint, cloudpickle.dumps(task)
    with open(folder / "wet_reader.py", "a") as file:
        file.write("\n# changed\n")
    assert ScanTask(task.files, source()).fingerprint != before
    (folder / "wet_reader.py").unlink()
    monkeypatch.chdir("/")
    made = cloudpickle.loads(sent).run(Store(str(folder / "store")), None, None)
    assert [table.num_rows for table in made.tables] == [3] and made.counts["documents"] == 3


def test_broken_files_and_broken_readers(folder):
    whole = (folder / "crawl" / "0.warc.wet.gz").read_bytes()
    body = gzip.decompress(whole)
    (folder / "crawl" / "0.warc.wet.gz").write_bytes(gzip.compress(body[:-5]))
    with pytest.raises(BadFileError, match=r"0.warc.wet.gz: .*wet_reader:WetReader: cut off"):
        read(source())
    (folder / "crawl" / "0.warc.wet.gz").write_bytes(whole[:-10])
    with pytest.raises(BadFileError, match="end-of-stream"):
        read(source())
    (folder / "bad_reader.py").write_text(BAD)
    documents = iter(
        read_documents(
            str(folder / "crawl/0.warc.wet.gz"),
            file=0,
            name="",
            settings=source(format="bad_reader:R"),
        )
    )
    assert next(documents).reason == "not a dictionary but str"
    with pytest.raises(
        CustomCodeError, match=r"bad_reader:R failed in `read`: KeyError: 'y' \(bad_reader.py:5"
    ):
        next(documents)


@pytest.mark.parametrize(
    ("name", "code", "says"),
    [
        ("none:R", None, "there is no module `none`"),
        ("bad_reader:Q", "class R: ...", "no class `Q`, only: R"),
        ("bad_reader:R", "class R: ...", "has no method read"),
        ("bad_reader:R", "class R:\n    def read(self, file): ...", "needs `suffixes = "),
    ],
)
def test_what_is_no_reader_is_refused(folder, name, code, says):
    if code is not None:
        (folder / "bad_reader.py").write_text(code)
    with pytest.raises(SpecError, match=f"format: {name}`: .*{says}"):
        list_source(source(format=name))


def test_formats_that_are_none():
    with pytest.raises(ValueError, match=r"'orc' is none of auto, parquet, jsonl, arrow, .*, nor"):
        source(format="orc")


def test_a_job_reads_with_it_and_submit_sends_it(folder, untrained, ray_cluster):
    pages = [
        record("conversion", f"https://a.org/{i}", f"page {i} ".encode() * 30) for i in range(9)
    ]
    (folder / "crawl" / "0.warc.wet.gz").write_bytes(b"".join(pages))
    content = {
        "job": "train",
        "store": str(folder / "store"),
        "data": {"path": str(folder / "crawl"), "format": NAME},
        "sequence_length": 16,
        "tokenizer": untrained["tokenizer"],
        "model": MODEL,
        "train": {"num_tokens": 4 * 8 * 16, **LEARNING},
    }
    spec = TrainSpec.model_validate(content)
    assert [[path for path, _ in code.files] for code in own_code(spec)] == [["wet_reader.py"]]
    run_job(spec, Quiet())
    scanned = [json.loads(p.read_text()) for p in (folder / "store").glob("scans/receipts/*.json")]
    assert [receipt["counts"]["documents"] for receipt in scanned] == [9]
