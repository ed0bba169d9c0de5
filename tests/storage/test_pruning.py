import threading
import time

import pyarrow as pa
import pytest

from stillhouse.fingerprint import fingerprint
from stillhouse.jobs.prune import look, prune_store, remove_found
from stillhouse.storage.artifact import Manifest, Receipt, Store
from stillhouse.storage.commit import MARKER, create, replace
from stillhouse.storage.filesystem import exists, join, list_names
from stillhouse.storage.pruning import promise, promised, take_back, wait_for_prune
from stillhouse.storage.run_record import RunRecord


def test_a_promise_holds_until_it_is_taken_back(folder):
    assert not promised(folder)
    take_back(folder)  # nothing to take back
    promise(folder)
    assert promised(folder)
    take_back(folder)
    assert not promised(folder)
    wait_for_prune(folder)


def test_a_promise_of_a_dead_prune_ends(folder):
    replace(join(folder, "pruning.json"), b'{"until": %d}' % (time.time() - 1))
    assert not promised(folder)


@pytest.fixture
def littered(bucket):
    """A store of which three parts are referred to by nothing."""
    store = Store(bucket)
    create(store.path(MARKER), b"{}")
    for name in "abc":
        create(store.path("scores", "parts", f"{fingerprint(name)}.parquet"), b"lost")
    return store


def test_a_run_that_starts_in_the_middle_waits_for_the_prune(littered, proxied):
    """The first removal is held up at the server until the run has announced itself."""
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
        announced.set()  # it said that it waits

    run = threading.Thread(target=start)
    run.start()
    found = prune_store(littered.uri, grace_hours=0, yes=True)
    run.join(60)
    assert found["removed"] == {"scores": {"objects": 3, "bytes": 12}}
    assert left_at_start == []
    assert not exists(littered.path("pruning.json"))


def put_selection(store, name):
    """A part, its receipt and the artifact that lists it."""
    table = pa.table({"value": [1.0, 2.0]})
    part = store.put_part(f"scores/parts/{name}.parquet", table, num_tokens=0)
    store.put_receipt("scores", Receipt(name, (part,)))
    store.put_manifest(Manifest("selections", name, (part,), {}, {}))


def test_what_a_run_adopts_and_ends_with_between_walk_and_promise_stays(store):
    """The bad order, step by step: the walk, a whole run that reuses all of it, the removals."""
    mine, other = fingerprint("adopted"), fingerprint("needed by nobody")
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
