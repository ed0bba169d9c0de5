import json
from dataclasses import asdict
from dataclasses import replace as replaced

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillhouse.errors import ArtifactError
from stillhouse.fingerprint import sha256
from stillhouse.storage.artifact import Manifest, PartRef, Receipt, Store, load_manifest
from stillhouse.storage.commit import create, replace
from stillhouse.storage.filesystem import filesystem, list_names, read_bytes
from stillhouse.storage.parquet import parquet_bytes, read_table

TABLE = pa.table({"x": [1, 2, 3]})
OTHER_BYTES = TABLE.replace_schema_metadata({"made by": "another version"})


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


def put_parts(store, parts):
    for part in parts:
        create(store.path(part.path), b"")


def test_part_is_written_once(store):
    part = store.put_part("tokens/parts/a.parquet", TABLE, num_tokens=12)
    data = read_bytes(store.path("tokens/parts/a.parquet"))
    assert part == PartRef("tokens/parts/a.parquet", 3, 12, len(data), sha256(data))
    assert read_table(store.path(part.path)).equals(TABLE)
    assert read_table(store.path(part.path), ["x"]).num_columns == 1
    assert parquet_bytes(OTHER_BYTES) != parquet_bytes(TABLE)
    assert store.put_part(part.path, OTHER_BYTES, num_tokens=12) == part
    with pytest.raises(ArtifactError, match=r"a.parquet has 3 rows where this run makes 2"):
        store.put_part(part.path, TABLE.slice(1), num_tokens=2)


def test_broken_and_missing_parts(store):
    create(store.path("a.parquet"), b"PAR1 no more")
    with pytest.raises(ArtifactError, match=r"part .*a.parquet is broken"):
        read_table(store.path("a.parquet"))
    with pytest.raises(ArtifactError, match=r"part a.parquet is broken"):
        store.put_part("a.parquet", TABLE, num_tokens=3)
    with pytest.raises(ArtifactError, match=r"b.parquet is missing though the store names it"):
        read_table(store.path("b.parquet"))


def test_row_groups_are_capped():
    table = pa.table({"x": range(20_000)})
    metadata = pq.read_metadata(pa.BufferReader(parquet_bytes(table)))
    assert [metadata.row_group(i).num_rows for i in range(3)] == [8192, 8192, 3616]


def test_receipts(store):
    one = Receipt("one", tuple(refs(2)), {"documents": 3}, {"name": "é"})
    put_parts(store, one.parts)
    assert store.put_receipt("tokens", one) == one
    assert store.put_receipt("tokens", Receipt("one", one.parts)) == one
    create(store.path("tokens", "receipts", f"two.json.{'0' * 32}.tmp"), b'{"task"')
    assert store.finished("tokens", ["none", "one", "two"]) == {"one": one}
    assert store.finished("scores", ["one"]) == {}
    for data in (b"{", b"[]", b'{"task": "x"}', b'{"task": "x", "parts": [{"path": 1}]}'):
        replace(store.path("tokens", "receipts", "x.json"), data)
        with pytest.raises(ArtifactError, match=r"tokens/receipts/x.json is broken: "):
            store.finished("tokens", ["x"])


def test_a_task_that_lost_a_part_is_repeated_and_gives_the_same_bytes(store):
    parts = [store.put_part(f"tokens/parts/{n}.parquet", TABLE, num_tokens=3) for n in "abc"]
    whole, lost = Receipt("whole", tuple(parts[:1])), Receipt("lost", tuple(parts[1:]))
    for receipt in (whole, lost):
        store.put_receipt("tokens", receipt)
    made = store.put_manifest(manifest(parts, files={}))
    remove_object(store.path(parts[2].path))
    assert store.finished("tokens", ["whole", "lost"]) == {"whole": whole}
    assert store.find_manifest("tokens", "f" * 64) is None
    store.put_part(parts[2].path, TABLE, num_tokens=3)
    assert store.put_receipt("tokens", lost) == lost
    assert store.finished("tokens", ["lost"]) == {"lost": lost}
    remove_object(store.path(parts[2].path))
    other = store.put_part(parts[2].path, OTHER_BYTES, num_tokens=3)
    for put, name in (
        (lambda: store.put_receipt("tokens", Receipt("lost", (other,))), "lost.json"),
        (lambda: store.put_manifest(replaced(made, parts=(other,))), "manifest.json"),
    ):
        with pytest.raises(ArtifactError, match=rf"{name} names other bytes of tokens/parts/c"):
            put()


def test_manifest(store):
    made = manifest(refs(300), totals={"curve": [(1, 2.5)]}, files={"a.json": "0" * 64})
    seen = store.put_manifest(made)
    assert seen.totals == {"curve": [[1, 2.5]]}  # as any reader gets it
    assert (seen.num_rows, seen.num_tokens) == (44850, 89700)
    assert store.put_manifest(replaced(made, totals={"seconds": 2})) == seen
    assert list_names(store.path("tokens", "f" * 64)) == ["manifest.json"]
    assert store.find_manifest("tokens", "f" * 64) is None
    put_parts(store, made.parts)
    assert store.find_manifest("tokens", "f" * 64) is None
    create(store.path("tokens", "f" * 64, "a.json"), b"")
    assert store.find_manifest("tokens", "f" * 64) == seen
    assert store.get_manifest("tokens", "f" * 64) == seen
    assert load_manifest(store.path("tokens", "f" * 64)) == seen


@pytest.mark.parametrize("left_behind", [False, True])
def test_manifest_of_many_parts(store, left_behind):
    """Its list of parts is a file, which a writer that died may have written in other bytes."""
    folder = store.path("tokens", "f" * 64)
    if left_behind:
        rows = pa.Table.from_pylist([asdict(ref) for ref in refs(301)])
        create(
            f"{folder}/parts.parquet", parquet_bytes(rows.replace_schema_metadata({"by": "other"}))
        )
    seen = store.put_manifest(manifest(refs(301)))
    assert list_names(folder) == ["manifest.json", "parts.parquet"]
    content = json.loads(read_bytes(f"{folder}/manifest.json"))
    data = read_bytes(f"{folder}/parts.parquet")
    assert "parts" not in content and content["parts_sha256"] == sha256(data)
    assert pq.read_table(pa.BufferReader(data)).num_rows == 301
    assert seen.parts == tuple(refs(301))
    assert store.get_manifest("tokens", "f" * 64) == seen
    replace(f"{folder}/parts.parquet", data[:-1] + b"?")
    with pytest.raises(ArtifactError, match=r"parts.parquet is not the list that its manifest"):
        store.get_manifest("tokens", "f" * 64)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"{", r"tokens/x/manifest.json is broken: "),
        (b"[1]", r"tokens/x/manifest.json is broken: "),
        (b"{}", r"tokens/x/manifest.json is broken: 'parts'"),
        (b'{"format_version": 1, "parts": []}', r"tokens/x/manifest.json is broken: .*missing"),
        (b'{"format_version": 1, "parts_sha256": "0"}', r"parts.parquet is missing, the list that"),
        (b'{"format_version": 2, "parts": []}', r"tokens/x/manifest.json is not what was written"),
        (b'{"format_version": 3, "new": 1}', r"newer Stillhouse \(format 3, this one reads 2\)"),
        (b'{"format_version": "a"}', r"tokens/x/manifest.json is broken: "),
    ],
)
def test_bad_manifests(store, data, sentence):
    replace(store.path("tokens", "x", "manifest.json"), data)
    with pytest.raises(ArtifactError, match=sentence):
        store.get_manifest("tokens", "x")


def test_missing_manifest_and_wrong_kind(store):
    store.put_manifest(manifest())
    with pytest.raises(ArtifactError, match=r"no artifact at .*tokens/x: there is no manifest"):
        store.get_manifest("tokens", "x")
    assert store.find_manifest("tokens", "x") is None
    with pytest.raises(ArtifactError, match=r"holds `tokens` where `selections` is needed"):
        load_manifest(store.path("tokens", "f" * 64), "selections")


def test_requests_of_an_artifact(bucket, proxied):
    """A put each for part, receipt and manifest."""
    store = Store(bucket)
    part = store.put_part("tokens/parts/a.parquet", TABLE, num_tokens=3)
    store.put_receipt("tokens", Receipt("a", (part,)))
    store.put_manifest(manifest([part]))
    assert [method for method, _ in proxied.requests] == ["PUT"] * 3
    proxied.requests.clear()
    store.get_manifest("tokens", "f" * 64)
    store.finished("tokens", ["a"])
    assert [method for method, _ in proxied.requests] == ["GET"] * 4  # two are listings


def test_many_receipts_are_read_at_once(bucket, proxied):
    store = Store(bucket)
    store.put_part("scans/parts/0.parquet", TABLE, num_tokens=3)
    part = PartRef("scans/parts/0.parquet", 3, 3, 1, "0" * 64)
    made = {f"{n:064}": Receipt(f"{n:064}", (part,), {"documents": n}) for n in range(200)}
    for receipt in made.values():
        store.put_receipt("scans", receipt)

    def finished():
        proxied.requests.clear()
        found = store.finished("scans", list(made))
        return found, len(proxied.requests)

    assert finished() == (made, 2 + 200 + 1)  # the cache was looked for
    store.remember("scans", list(made.values())[:50])  # few: not kept together
    assert finished() == (made, 2 + 200 + 1)
    store.remember("scans", list(made.values())[:150])
    assert finished() == (made, 2 + 1 + 50)
    store.remember("scans", made.values())
    assert finished() == (made, 2 + 1 + 50)  # fifty are few
    last = Receipt("f" * 64, (part,))
    store.put_receipt("scans", last)
    store.remember("scans", [*made.values(), *[Receipt(f"x{n}", ()) for n in range(20)], last])
    assert finished() == (made, 2 + 1)
    # a receipt that was removed counts no more, nor one that lost its part
    remove_object(store.path("scans/receipts", f"{7:064}.json"))
    assert finished()[0].keys() == made.keys() - {f"{7:064}"}
    replace(store.path("cache/receipts-scans.parquet"), b"PAR1 and no more")
    assert finished() == ({n: r for n, r in made.items() if r.counts["documents"] != 7}, 202)
    remove_object(store.path(part.path))
    assert finished()[0] == {}
