import threading
import time

import pytest

from stillhouse.fingerprint import fingerprint
from stillhouse.jobs.prune import prune_store
from stillhouse.storage.artifact import Store
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
