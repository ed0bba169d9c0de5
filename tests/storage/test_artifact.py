import json
from dataclasses import replace as replaced

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillhouse.errors import ArtifactError
from stillhouse.fingerprint import sha256
from stillhouse.storage.artifact import Manifest, PartRef, Receipt, load_manifest
from stillhouse.storage.commit import create, replace
from stillhouse.storage.filesystem import filesystem, list_names, read_bytes
from stillhouse.storage.parquet import parquet_bytes, read_table

TABLE = pa.table({"x": [1, 2, 3]})


def manifest(parts=(), **changes):
    fields = {"kind": "tokens", "fingerprint": "f" * 64, "inputs": {}, "settings": {"a": 1}}
    return Manifest(**(fields | {"parts": tuple(parts)} | changes))


def remove_object(uri):
    fs, path = filesystem(uri)
    fs.rm_file(path)


def refs(count):
    return [
        PartRef(f"tokens/parts/{i}.parquet", i, 2 * i, 3 * i, f"{i:064d}") for i in range(count)
    ]


def test_part(store):
    part = store.put_part("tokens/parts/a.parquet", TABLE, num_tokens=12)
    data = read_bytes(store.path("tokens/parts/a.parquet"))
    assert part == PartRef("tokens/parts/a.parquet", 3, 12, len(data), sha256(data))
    assert read_table(store.path(part.path)).equals(TABLE)
    assert read_table(store.path(part.path), ["x"]).num_columns == 1


def test_second_writer_of_a_part_adopts_the_first_ones(store):
    first = store.put_part("a.parquet", TABLE, num_tokens=3)
    other = TABLE.replace_schema_metadata({"made by": "another version"})
    assert parquet_bytes(other) != parquet_bytes(TABLE)
    assert store.put_part("a.parquet", other, num_tokens=3) == first


def test_part_of_other_rows_is_no_rival(store):
    store.put_part("a.parquet", TABLE, num_tokens=3)
    with pytest.raises(ArtifactError, match=r"part a.parquet has 3 rows where this run makes 2"):
        store.put_part("a.parquet", TABLE.slice(1), num_tokens=2)


def test_broken_part(store):
    create(store.path("a.parquet"), b"PAR1 no more")
    with pytest.raises(ArtifactError, match=r"part .*a.parquet is broken"):
        read_table(store.path("a.parquet"))
    with pytest.raises(ArtifactError, match=r"part a.parquet is broken"):
        store.put_part("a.parquet", TABLE, num_tokens=3)
    with pytest.raises(
        ArtifactError, match=r"part .*b.parquet is missing though the store names it"
    ):
        read_table(store.path("b.parquet"))


def test_row_groups_are_capped():
    table = pa.table({"x": range(20_000)})
    metadata = pq.read_metadata(pa.BufferReader(parquet_bytes(table, {"k": "v"})))
    assert [metadata.row_group(i).num_rows for i in range(3)] == [8192, 8192, 3616]
    assert metadata.metadata[b"k"] == b"v"


def put_parts(store, parts):
    for part in parts:
        create(store.path(part.path), b"")


def test_receipts(store):
    one = Receipt("one", tuple(refs(2)), {"documents": 3}, {"name": "é"})
    put_parts(store, one.parts)
    assert store.put_receipt("tokens", one) == one
    assert store.put_receipt("tokens", Receipt("one", one.parts)) == one
    assert store.finished("tokens", ["none", "one"]) == {"one": one}
    assert store.finished("scores", ["one"]) == {}


def test_a_task_that_lost_a_part_is_not_finished(store):
    parts = [store.put_part(f"tokens/parts/{n}.parquet", TABLE, num_tokens=3) for n in "abc"]
    whole, lost = Receipt("whole", tuple(parts[:1])), Receipt("lost", tuple(parts[1:]))
    for receipt in (whole, lost):
        store.put_receipt("tokens", receipt)
    remove_object(store.path(parts[2].path))
    assert store.finished("tokens", ["whole", "lost"]) == {"whole": whole}
    # done again: the same bytes, the same receipt
    store.put_part(parts[2].path, TABLE, num_tokens=3)
    assert store.put_receipt("tokens", lost) == lost
    assert store.finished("tokens", ["lost"]) == {"lost": lost}


def test_a_lost_part_that_comes_out_differently_is_named(store):
    part = store.put_part("tokens/parts/a.parquet", TABLE, num_tokens=3)
    store.put_receipt("tokens", Receipt("a", (part,)))
    made = store.put_manifest(manifest([part], files={"x": "0" * 64}))
    remove_object(store.path(part.path))
    other = store.put_part(part.path, TABLE.replace_schema_metadata({"k": "v"}), num_tokens=3)
    for put, name in (
        (lambda: store.put_receipt("tokens", Receipt("a", (other,))), "a.json"),
        (lambda: store.put_manifest(replaced(made, parts=(other,))), "manifest.json"),
    ):
        with pytest.raises(ArtifactError, match=rf"{name} names other bytes of tokens/parts/a"):
            put()


def test_an_artifact_that_lost_something_is_not_found(store):
    parts = refs(2)
    files = {"a.json": "0" * 64}
    made = store.put_manifest(manifest(parts, files=files))
    assert store.find_manifest("tokens", "f" * 64) is None
    put_parts(store, parts)
    assert store.find_manifest("tokens", "f" * 64) is None
    create(store.path("tokens", "f" * 64, "a.json"), b"")
    assert store.find_manifest("tokens", "f" * 64) == made
    assert store.get_manifest("tokens", "f" * 64) == made


def test_broken_receipts(store):
    for data in (b"{", b"[]", b'{"task": "x"}', b'{"task": "x", "parts": [{"path": 1}]}'):
        replace(store.path("tokens", "receipts", "x.json"), data)
        with pytest.raises(ArtifactError, match=r"tokens/receipts/x.json is broken: "):
            store.finished("tokens", ["x"])


def test_leftovers_are_no_receipts(tmp_path, store):
    store.put_receipt("tokens", Receipt("one", ()))
    create(store.path("tokens", "receipts", f"two.json.{'0' * 32}.tmp"), b'{"task"')
    assert list(store.finished("tokens", ["one", "two"])) == ["one"]


def test_manifest(store):
    made = manifest(refs(300), totals={"curve": [(1, 2.5)]})
    put_parts(store, made.parts)
    seen = store.put_manifest(made)
    assert seen.totals == {"curve": [[1, 2.5]]}  # as any reader gets it
    assert (seen.num_rows, seen.num_tokens) == (44850, 89700)
    assert store.get_manifest("tokens", "f" * 64) == seen
    assert store.find_manifest("tokens", "f" * 64) == seen
    assert load_manifest(store.path("tokens", "f" * 64)) == seen
    assert list_names(store.path("tokens", "f" * 64)) == ["manifest.json"]


def test_second_writer_of_a_manifest_adopts_the_first_ones(store):
    first = store.put_manifest(manifest(refs(2), totals={"seconds": 1}))
    assert store.put_manifest(manifest(refs(2), totals={"seconds": 2})) == first


def test_manifest_of_many_parts(store):
    seen = store.put_manifest(manifest(refs(301)))
    folder = store.path("tokens", "f" * 64)
    assert list_names(folder) == ["manifest.json", "parts.parquet"]
    content = json.loads(read_bytes(f"{folder}/manifest.json"))
    assert "parts" not in content
    assert content["parts_sha256"] == sha256(read_bytes(f"{folder}/parts.parquet"))
    assert pq.read_table(pa.BufferReader(read_bytes(f"{folder}/parts.parquet"))).num_rows == 301
    assert seen.parts == tuple(refs(301))
    assert store.get_manifest("tokens", "f" * 64) == seen


def test_list_of_parts_left_by_a_writer_that_died(store):
    """Its bytes differ (another Parquet version); the manifest must name those that stand."""
    rows = pa.Table.from_pylist([{**_row(ref)} for ref in refs(301)])
    create(store.path("tokens", "f" * 64, "parts.parquet"), parquet_bytes(rows, {"by": "other"}))
    seen = store.put_manifest(manifest(refs(301)))
    assert store.get_manifest("tokens", "f" * 64) == seen
    assert seen.parts == tuple(refs(301))


def _row(ref):
    return {name: getattr(ref, name) for name in PartRef.__slots__}


def test_list_of_parts_must_be_the_named_one(store):
    store.put_manifest(manifest(refs(301)))
    uri = store.path("tokens", "f" * 64, "parts.parquet")
    replace(uri, read_bytes(uri)[:-1] + b"?")
    with pytest.raises(ArtifactError, match=r"parts.parquet is not the list that its manifest"):
        store.get_manifest("tokens", "f" * 64)


def test_list_of_parts_is_missing(store):
    content = {"format_version": 1, "parts_sha256": "0" * 64}
    replace(store.path("tokens", "x", "manifest.json"), json.dumps(content).encode())
    with pytest.raises(ArtifactError, match=r"parts.parquet is missing, the list that its manif"):
        store.get_manifest("tokens", "x")


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"{", r"tokens/x/manifest.json is broken: "),
        (b"[1]", r"tokens/x/manifest.json is broken: "),
        (b"{}", r"tokens/x/manifest.json is broken: 'parts'"),
        (b'{"format_version": 1, "parts": []}', r"tokens/x/manifest.json is broken: .*missing"),
        (b'{"format_version": 2, "parts": []}', r"tokens/x/manifest.json is not what was written"),
        (b'{"format_version": 3, "new": 1}', r"newer Stillhouse \(format 3, this one reads 2\)"),
        (b'{"format_version": "a"}', r"tokens/x/manifest.json is broken: "),
    ],
)
def test_bad_manifests(store, data, sentence):
    replace(store.path("tokens", "x", "manifest.json"), data)
    for read in (store.get_manifest, store.find_manifest):
        with pytest.raises(ArtifactError, match=sentence):
            read("tokens", "x")


def test_no_manifest_or_another_kind(store):
    store.put_manifest(manifest())
    with pytest.raises(
        ArtifactError, match=r"no artifact at .*tokens/x: there is no manifest.json"
    ):
        store.get_manifest("tokens", "x")
    assert store.find_manifest("tokens", "x") is None
    with pytest.raises(ArtifactError, match=r"holds `tokens` where `selections` is needed"):
        load_manifest(store.path("tokens", "f" * 64), "selections")


def test_requests_of_an_artifact(bucket, proxied):
    """A put each for part, receipt and manifest, and nothing else."""
    from stillhouse.storage.artifact import Store

    store = Store(bucket)
    part = store.put_part("tokens/parts/a.parquet", TABLE, num_tokens=3)
    store.put_receipt("tokens", Receipt("a", (part,)))
    store.put_manifest(manifest([part]))
    assert [method for method, _ in proxied.requests] == ["PUT"] * 3
    proxied.requests.clear()
    store.get_manifest("tokens", "f" * 64)
    store.finished("tokens", ["a"])
    assert [method for method, _ in proxied.requests] == ["GET"] * 4  # two are listings
