"""References in stores made by hand; prunes and runs that exclude each other."""

import importlib
import json
import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest

from stillhouse.fingerprint import fingerprint
from stillhouse.jobs.prune import look, prune_store, remove_found
from stillhouse.storage.artifact import Manifest, Receipt, Store
from stillhouse.storage.commit import MARKER, check_store, create, replace
from stillhouse.storage.filesystem import exists, list_names
from stillhouse.storage.reachability import (
    KINDS,
    announce_prune,
    end_prune,
    is_pruned,
    list_objects,
    references,
    remove,
    unreachable,
    wait_for_prune,
)
from stillhouse.storage.run_record import RunRecord
from stillhouse.storage.task import Task

FOREVER = float("inf")
ROOT = Path(__file__).parents[2]


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
    """What an unfinished run names goes too; files of others stay."""
    name = put_artifact(store, "tokens", "unused", inputs={"tokens": kept["tokens"]})
    put_json(store, f"runs/{fingerprint('half')}/status.json", {"state": "failed", "tokens": name})
    task = fingerprint(["tokens", "unused", "task"])
    temporary = f"pins/a/00000002.json.{'0' * 32}.tmp"
    for path in (temporary, "README.md", "models/notes.txt", f"other/{fingerprint('x')}/data.bin"):
        put_json(store, path, {})
    assert unreached(store) == [
        f"tokens/{name}/manifest.json",
        f"tokens/receipts/{task}.json",
        temporary,
        f"tokens/parts/{task}.parquet",
    ]


def test_what_any_task_writes_is_of_a_known_kind():
    """Else it would never be removed."""
    written = [path for path in ROOT.glob("stillhouse/**/*.py") if "Task)" in path.read_text()]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in written]
    found = [one for name in names for one in vars(importlib.import_module(name)).values()]
    tasks = [one for one in found if isinstance(one, type) and issubclass(one, Task)]
    kinds = {one.KIND for one in tasks if one is not Task}
    assert kinds > {"evaluations", "signals", "arms"} and kinds <= {*KINDS}


def test_a_part_without_a_receipt_goes_once_it_is_old(store, kept):
    path = f"scores/parts/{fingerprint('lost')}.parquet"
    store.put_part(path, pa.table({"value": [1]}), num_tokens=1)
    assert unreached(store) == [path]
    made = next(o.modified for o in list_objects(store.uri) if o.path == path)
    assert unreached(store, older_than=made) == []


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


def test_a_prune_is_announced_until_it_or_its_lease_ends(store):
    assert not is_pruned(store.uri)
    end_prune(store.uri)
    announce_prune(store.uri)
    assert is_pruned(store.uri)
    end_prune(store.uri)
    assert not is_pruned(store.uri)
    wait_for_prune(store.uri)
    replace(store.path("pruning.json"), b'{"until": %d}' % (time.time() - 1))
    assert not is_pruned(store.uri)


def test_a_run_that_starts_in_the_middle_waits_for_the_prune(bucket, proxied):
    """The first removal is held up at the server until the run has announced itself."""
    littered = Store(bucket)
    create(littered.path(MARKER), b"{}")
    for name in "abc":
        create(littered.path("scores", "parts", f"{fingerprint(name)}.parquet"), b"unused")
    removing, announced = threading.Event(), threading.Event()

    def hold(n, method, path):
        if method in ("DELETE", "POST") and "/scores/" in path:
            removing.set()
            return announced
        return None

    proxied.rule = hold
    left_at_start = []

    def start():
        removing.wait(60)
        record = RunRecord(littered, "r" * 64)
        threading.Thread(target=release, args=(record.uri,)).start()
        record.start("job: select", "select")
        left_at_start.extend(list_names(littered.path("scores", "parts")))

    def release(run):
        while "events-00000002.jsonl" not in list_names(run):
            time.sleep(0.05)
        announced.set()  # the event that it waits

    run = threading.Thread(target=start)
    run.start()
    found = prune_store(littered.uri, grace_hours=0, yes=True)
    run.join(60)
    assert found["removed"] == {"scores": {"objects": 3, "bytes": 18}}
    assert left_at_start == []
    assert not exists(littered.path("pruning.json"))


def put_selection(store, name):
    """A part, its receipt and the artifact that lists it."""
    table = pa.table({"value": [1.0, 2.0]})
    part = store.put_part(f"scores/parts/{name}.parquet", table, num_tokens=0)
    store.put_receipt("scores", Receipt(name, (part,)))
    store.put_manifest(Manifest("selections", name, (part,), {}, {}))


def test_what_a_run_reuses_between_walk_and_announcement_stays(store):
    """The bad order, step by step: the walk, a whole run that reuses all of it, the removals."""
    mine, other = fingerprint("adopted"), fingerprint("unused")
    create(store.path(MARKER), b"{}")
    for name in (mine, other):
        put_selection(store, name)
    before = time.time() + 60  # everything is old
    found = look(store.uri, before)
    assert len(found.gone) == 6
    record = RunRecord(store, "r" * 64)
    record.start("job: select", "select")
    record.put_result({"job": "select", "selection_fingerprint": mine})
    record.finish("done")
    removed = remove_found(store.uri, found, before)
    assert sorted(item.path for item in removed) == [
        f"scores/parts/{other}.parquet",
        f"scores/receipts/{other}.json",
        f"selections/about/{other}/manifest.json",
    ]
    assert store.find_manifest("selections", mine) is not None
    assert store.finished("scores", [mine]).keys() == {mine}
    assert not exists(store.path("pruning.json"))
