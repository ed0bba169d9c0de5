"""Lists of a take-down, and what is found in two small units of a pool."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillhouse.data_settings import ExcludeSettings, PoolSource
from stillhouse.errors import InputError
from stillhouse.selection.takedown import (
    TakedownTask,
    as_ranges,
    documents_with,
    num_seen,
    read_lists,
    taken_rows,
    unique_keys,
)
from stillhouse.storage.artifact import Store
from stillhouse.storage.filesystem import list_files
from stillhouse.storage.parquet import read_table
from stillhouse.storage.task import commit
from stillhouse.text.documents import Document
from stillhouse.text.duplicates import document_hash, hash_array
from stillhouse.text.packing import Packer, tokens_table
from stillhouse.text.tasks import ScanTask, UnitFile

POOL = [  # two units
    [{"id": "a", "url": "u/a", "text": "One text"}, {"id": "b", "url": None, "text": "another"}],
    [{"url": "u/c", "text": "a third"}, {"id": "d", "url": "u/d", "text": "one  TEXT"}],
]
DIGESTS = ("0" * 64, "1" * 64)


@pytest.fixture
def units(tmp_path):
    """The store, and of each unit its task and receipt: Parquet, then JSON Lines."""
    store = Store(str(tmp_path / "store"))
    paths = [tmp_path / "0.parquet", tmp_path / "1.jsonl"]
    pq.write_table(pa.Table.from_pylist(POOL[0]), paths[0])
    paths[1].write_text("\n".join(map(json.dumps, POOL[1])))
    source, found = PoolSource(path=str(tmp_path)), []
    for path, digest in zip(paths, DIGESTS, strict=True):
        task = ScanTask((UnitFile(str(path), digest, None),), source)
        found.append((task, commit(store, task, task.run(store, None, None))))
    return store, found


def lists_of(tmp_path, **lists):
    """Lists read from text files with these values."""
    files = {}
    for kind, values in lists.items():
        path = tmp_path / f"{kind}.txt"
        path.write_text("\n".join(values))
        files[kind] = list_files([str(path)], (".txt",))
    return read_lists(ExcludeSettings(**{k: f[0].uri for k, f in files.items()}), files)


def search(units, lists):
    """What each unit has: pairs of (kind, hash of the text)."""
    store, scanned = units
    found = []
    for unit, receipt in scanned:
        task = TakedownTask(receipt, lists.digest, unit, lists.url_column)
        parts = commit(store, task, task.run(store, lists.keys, None)).parts
        rows = [row for part in parts for row in read_table(store.path(part.path)).to_pylist()]
        found.append([(row["kind"], row["hash"]) for row in rows])
    return found


def test_documents_are_found_by_id_hash_and_url(units, tmp_path):
    one, another, third = map(document_hash, ("one text", "another", "a third"))
    lists = lists_of(tmp_path, ids=["b", "gone", f"{'1' * 12}:0"])  # as a row without id is named
    assert search(units, lists) == [[(0, another)], [(0, third)]]
    lists = lists_of(tmp_path, hashes=[one.hex(), "f" * 32])
    assert search(units, lists) == [[(1, one)], [(1, one)]]
    lists = lists_of(tmp_path, urls=["u/d", "u/nowhere"], ids=["d"])
    assert search(units, lists) == [[], [(0, one), (2, one)]]


def test_copies_go_too_and_what_a_model_saw_is_counted(units):
    store, scanned = units
    hashes = unique_keys(document_hash("one text") + document_hash("nothing"))
    pairs = [(receipt, [digest]) for (_, receipt), digest in zip(scanned, DIGESTS, strict=True)]
    documents = as_ranges(documents_with(store, hashes, pair) for pair in pairs)
    assert {f: r.tolist() for f, r in documents.items()} == {
        DIGESTS[0]: [[0, 1]],
        DIGESTS[1]: [[1, 2]],
    }
    seen = {DIGESTS[0]: np.array([[0, 2]]), DIGESTS[1]: np.array([[0, 1]]), "2": np.array([[0, 9]])}
    assert num_seen(documents, seen) == 1


def test_every_sequence_with_a_token_of_theirs_is_hit(tmp_path):
    """Documents of 6, 12 and 6 tokens in three sequences of eight; the second lies in all."""
    packer = Packer(sequence_length=8, eos_id=0, dtype=np.uint16, part_rows=9)
    for row, count in enumerate((5, 11, 5)):
        packer.add(Document(0, row, f"d{row}", "a", ""), np.full(count, row + 1, np.uint32))
    store = Store(str(tmp_path))
    part = store.put_part("t.parquet", tokens_table(packer.finish()), num_tokens=24)

    def rows(row, grain):
        documents = {DIGESTS[0]: np.array([[row, row + 1]])}
        return taken_rows(store, documents, grain, (part.path, [DIGESTS[0]])).tolist()

    assert [rows(row, "sequences") for row in range(3)] == [[0], [0, 1, 2], [2]]
    assert [rows(row, "documents") for row in range(3)] == [[0], [1], [2]]


def test_the_form_of_a_list_does_not_matter(tmp_path):
    """Order, repetition, blank lines, and text, JSON Lines or Parquet."""
    (tmp_path / "a.txt").write_text(" u/2 \n\nu/1\nu/2\n")
    (tmp_path / "b.jsonl").write_text('{"url": "u/1"}\n{"url": "u/2", "why": "asked"}\n')
    pq.write_table(pa.table({"url": ["u/2", "u/1"]}), tmp_path / "c.parquet")
    found = set()
    for name in ("a.txt", "b.jsonl", "c.parquet"):
        files = {"urls": list_files([str(tmp_path / name)], (".txt", ".jsonl", ".parquet"))}
        found.add(read_lists(ExcludeSettings(urls=name), files).digest)
    assert len(found) == 1
    text = document_hash("a text")
    pq.write_table(pa.table({"hash": pa.array([text], pa.binary(16))}), tmp_path / "h.parquet")
    files = {"hashes": list_files([str(tmp_path / "h.parquet")], (".parquet",))}
    keys = read_lists(ExcludeSettings(hashes="h"), files).keys["hashes"]
    assert keys.tobytes() == text
    assert hash_array(pa.chunked_array([pa.array([text], pa.binary(16))])).tolist() == keys.tolist()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"link": "u"}', r"row 0: no `url` .`exclude.urls`.; it has link"),
        ("x.jsonl", '{"url": null}', "row 0: no `url`"),
        ("x.jsonl", '{"url": {"a": 1}}', "row 0: `url` is no plain value"),
        ("x.jsonl", '{"url": "u"}\nu', "row 1: broken JSON"),
        ("x.parquet", pa.table({"urls": ["u"]}), "no column `url` .*rename `urls`.*It has urls"),
    ],
)
def test_a_list_that_cannot_be_used_is_refused(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content) if isinstance(content, str) else pq.write_table(content, path)
    files = {"urls": list_files([str(path)], (".jsonl", ".parquet"))}
    with pytest.raises(InputError, match=message):
        read_lists(ExcludeSettings(urls=name), files)


def test_a_hash_has_32_digits(tmp_path):
    with pytest.raises(InputError, match="line 2: 'abc' is no hash of a text"):
        lists_of(tmp_path, hashes=["0" * 32, "abc"])
