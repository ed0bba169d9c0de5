"""What keeps what, in a store made by hand, on disk and on S3."""

import json
import time

import pyarrow as pa
import pytest

from stillhouse.fingerprint import fingerprint
from stillhouse.storage.artifact import Manifest, Receipt, Store
from stillhouse.storage.commit import check_store, create
from stillhouse.storage.reachability import list_objects, references, remove, unreachable

FOREVER = float("inf")


def put_artifact(store, kind, word, inputs=None, settings=None):
    """An artifact of one part with its receipt; its fingerprint."""
    task = fingerprint([kind, word, "task"])
    table = pa.table({"value": [len(word)]})
    part = store.put_part(f"{kind}/parts/{task}.parquet", table, num_tokens=1)
    store.put_receipt(kind, Receipt(task, (part,)))
    name = fingerprint([kind, word])
    store.put_manifest(Manifest(kind, name, (part,), inputs or {}, settings or {}))
    return name


def put_json(store, path, content):
    create(store.path(path), json.dumps(content).encode())


def unreached(store, older_than=FOREVER):
    objects = list_objects(store.uri)
    gone = unreachable(objects, references(store.uri, objects), older_than)
    return [item.path for item in gone]


@pytest.fixture
def kept(store):
    """A finished run's selection, the tokens it names, a pinned model and a published one."""
    check_store(store.uri)
    tokens = put_artifact(store, "tokens", "used")
    selection = put_artifact(store, "selections", "used", inputs={"tokens": tokens})
    put_json(store, f"runs/{fingerprint('run')}/result.json", {"selection": f"/old/{selection}"})
    pinned, published = (put_artifact(store, "models", word) for word in ("pinned", "named"))
    put_json(store, "pins/a/00000001.json", {"models": pinned})
    put_json(store, "names/web/00000001.json", {"uri": f"s3://elsewhere/models/{published}"})
    return {"tokens": tokens, "selections": selection, "pinned": pinned, "published": published}


def test_roots_keep_what_they_name_and_what_that_names(store, kept):
    objects = list_objects(store.uri)
    reached = references(store.uri, objects)
    assert reached[kept["tokens"]] == {f"selections/{kept['selections']}"}
    assert reached[kept["selections"]] == {f"runs/{fingerprint('run')}"}
    assert reached[kept["pinned"]] == {"pins/a"}
    assert reached[kept["published"]] == {"names/web"}
    assert unreached(store) == []


def test_the_rest_goes_manifests_first(store, kept):
    name = put_artifact(store, "tokens", "unused", inputs={"tokens": kept["tokens"]})
    task = fingerprint(["tokens", "unused", "task"])
    assert unreached(store) == [
        f"tokens/{name}/manifest.json",
        f"tokens/receipts/{task}.json",
        f"tokens/parts/{task}.parquet",
    ]


def test_an_unfinished_run_keeps_nothing(store):
    name = put_artifact(store, "tokens", "half")
    put_json(store, f"runs/{fingerprint('run')}/status.json", {"state": "failed", "tokens": name})
    assert f"tokens/{name}/manifest.json" in unreached(store)


def test_a_part_without_a_receipt_goes_once_it_is_old(store, kept):
    path = f"scores/parts/{fingerprint('lost')}.parquet"
    store.put_part(path, pa.table({"value": [1]}), num_tokens=1)
    assert unreached(store) == [path]
    made = next(o.modified for o in list_objects(store.uri) if o.path == path)
    assert unreached(store, older_than=made) == []


def test_leftovers_of_writers_go_and_files_of_others_stay(store, kept):
    temporary = f"pins/a/00000002.json.{'0' * 32}.tmp"
    for path in (temporary, "README.md", "models/notes.txt", f"other/{fingerprint('x')}/data.bin"):
        put_json(store, path, {})
    assert unreached(store) == [temporary]


def test_every_part_of_a_long_manifest_is_kept(store):
    parts = tuple(
        store.put_part(
            f"tokens/parts/{fingerprint(number)}.parquet", pa.table({"value": [1]}), num_tokens=1
        )
        for number in range(301)
    )
    store.put_manifest(Manifest("tokens", fingerprint("long"), parts, {}, {}))
    put_json(store, "pins/a/00000001.json", {"tokens": fingerprint("long")})
    assert unreached(store) == []


def test_remove_takes_what_it_is_given(store, kept):
    put_artifact(store, "tokens", "unused")
    objects = list_objects(store.uri)
    gone = unreachable(objects, references(store.uri, objects), FOREVER)
    assert remove(store.uri, gone, time.monotonic()) == []
    later = time.monotonic() + 600
    assert remove(store.uri, gone, later) == gone
    assert remove(store.uri, gone, later) == gone  # gone already
    left = {item.path for item in list_objects(store.uri)}
    assert left == {item.path for item in objects} - {item.path for item in gone}


def test_no_store_holds_nothing(tmp_path):
    assert list_objects(Store(str(tmp_path / "none")).uri) == []
