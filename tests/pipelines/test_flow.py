"""Parts through a real actor pool: order, reuse, errors, and workers that die."""

import json
import os
import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import pytest
from ray import cloudpickle
from small import Quiet

from stillhouse.actors.part_worker import Failure
from stillhouse.errors import InputError, PartFailedError, StoreUnreachableError
from stillhouse.pipelines.context import Context, Unfinished
from stillhouse.pipelines.flow import STORAGE_BUDGET, finish_parts, run_tasks, stream_parts
from stillhouse.spec import ComputeSettings
from stillhouse.storage.artifact import Receipt, Store

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests


@dataclass(frozen=True)
class Task:
    fingerprint: str


class Writer:
    """Writes a part for each task, but for the names that say what goes wrong."""

    def __init__(self, store):
        self.store = store

    def prefetch(self, task):
        pass

    def run(self, task):
        name = task.fingerprint
        if name == "poison" or (name == "once" and self._first_time()):
            os._exit(1)
        if name == "bad":
            raise InputError("bad is bad")
        if name == "bug":
            raise ZeroDivisionError("who divides?")
        table = pa.table({"name": [name]})
        part = self.store.put_part(f"things/parts/{name}.parquet", table, num_tokens=1)
        return self.store.put_receipt("things", Receipt(name, (part,), {"tokens": 1}))

    def _first_time(self):
        try:
            open(self.store.path("begun"), "x").close()
        except FileExistsError:
            return False
        return True


@pytest.fixture
def stream(ray_cluster, tmp_path):
    """Streams tasks of the given names; its context can be looked at."""
    store = Store(str(tmp_path))

    def call(*names, workers=1, dry=False, attempts=2):
        call.ctx = Context(store, ComputeSettings(max_attempts=attempts), Quiet(), dry=dry)
        tasks = [Task(name) for name in names]
        receipts = stream_parts(
            call.ctx,
            "things",
            kind="things",
            tasks=tasks,
            make=partial(Writer, store),
            workers=workers,
        )
        return [receipt.task for receipt in receipts]

    call.store = store
    return call


def test_in_order_and_found_again(stream):
    names = ["c", "a", "b", "a"]
    assert stream(*names, workers=2) == names
    assert stream.ctx.listener.steps == [("things", 4, 1)]  # the second "a" is the first
    assert stream("d", *names, dry=False) == ["d", *names]
    work = stream.ctx.work["things"]
    assert (work.parts, work.reused) == (5, 4)
    assert work.device_seconds > 0
    assert sum(done for _, done, _ in stream.ctx.listener.advanced) == 1


def test_a_dry_run_stops_where_there_is_something_to_do(stream):
    with pytest.raises(Unfinished, match="things"):
        stream("a", dry=True)
    assert list(stream.store.finished("things", ["a"])) == []


def test_a_poison_part_is_given_up_and_named(stream):
    with pytest.raises(PartFailedError, match="part poison killed its worker 2 times") as failed:
        stream("a", "poison", "b")
    assert failed.value.exit_code == 4
    assert "poison" not in stream.store.finished("things", ["a", "poison", "b"])


def test_a_lost_worker_costs_its_part_once(stream):
    assert stream("a", "once", "b") == ["a", "once", "b"]


def test_a_tasks_own_error_keeps_its_type(stream):
    with pytest.raises(InputError, match=r"^bad is bad$"):
        stream("a", "bad")


def test_an_unexpected_error_brings_its_traceback(stream):
    with pytest.raises(RuntimeError, match=r"(?s)in run.*ZeroDivisionError: who divides"):
        stream("bug")


def test_run_tasks_keeps_the_order(stream):
    ctx = Context(stream.store, ComputeSettings(), Quiet())
    assert list(run_tasks(ctx, str, range(6), in_flight=2)) == ["0", "1", "2", "3", "4", "5"]
    assert list(run_tasks(ctx, str, [])) == []


def test_dry_tasks_do_nothing(stream):
    ctx = Context(stream.store, ComputeSettings(), Quiet(), dry=True)
    with pytest.raises(Unfinished):
        list(run_tasks(ctx, str, [1]))


@pytest.fixture
def notes():
    """A listener that keeps what it is noted."""

    class Noting(Quiet):
        def __init__(self):
            super().__init__()
            self.noted = []

        def note(self, kind, content):
            self.noted.append((kind, content["message"]))

    return Noting()


def test_a_part_that_cannot_reach_the_store_goes_back_into_the_queue(
    ray_cluster, bucket, proxied, notes
):
    """Eight tries are all that one attempt has; the ninth request for the part is let through."""
    proxied.rule = lambda n, method, path: (
        "503" if "parts/b.parquet" in path and len(proxied.faults) < 8 else None
    )
    store = Store(f"{bucket}/store")
    given = {"FSSPEC_S3": json.dumps({"endpoint_url": proxied.url})}
    receipts = stream_parts(
        Context(store, ComputeSettings(max_attempts=1), notes),
        "things",
        kind="things",
        tasks=[Task(name) for name in "abc"],
        make=partial(Writer, store),
        workers=1,
        options={"num_cpus": 1, "runtime_env": {"env_vars": given}},
    )
    assert [receipt.task for receipt in receipts] == ["a", "b", "c"]
    assert proxied.faults == ["503"] * 8
    ((kind, message),) = notes.noted
    assert kind == "waiting" and "parts/b.parquet failed" in message


def unreachable(asked, always):
    """A stream in which the tasks called `always` never reach the store."""

    def stream(tasks):
        for task in tasks:
            name = task.fingerprint
            asked[name] += 1
            if name in always:
                failure = Failure("StoreUnreachableError", f"writing {name} failed", name, "node")
                yield None, failure, 1.0
            else:
                yield Receipt(name, ()), None, 1.0

    return stream


def test_it_is_given_up_in_the_end_and_said_where(ray_cluster, tmp_path, notes):
    ctx, asked = Context(Store(str(tmp_path)), ComputeSettings(), notes), Counter()
    tasks = [Task(name) for name in "abc"]
    with pytest.raises(StoreUnreachableError, match="writing b failed"):
        finish_parts(ctx, "things", "things", tasks, unreachable(asked, "b"), unit="tokens")
    assert asked == {"a": 1, "c": 1, "b": STORAGE_BUDGET}
    assert (ctx.failed_at.part, ctx.failed_at.node) == ("b", "node")


def test_where_no_part_reaches_the_store_not_all_of_them_are_tried(ray_cluster, tmp_path, notes):
    ctx, asked = Context(Store(str(tmp_path)), ComputeSettings(), notes), Counter()
    names = [f"p{i}" for i in range(1000)]
    tasks = [Task(name) for name in names]
    with pytest.raises(StoreUnreachableError):
        finish_parts(ctx, "things", "things", tasks, unreachable(asked, names), unit="tokens")
    assert len(asked) == 40


def _unreached_twice(store, item):
    """Fails for the first two calls of each item, as files tell."""
    for attempt in range(2):
        try:
            open(f"{store}/{item}-{attempt}", "x").close()
        except FileExistsError:
            continue
        raise StoreUnreachableError(f"reading {item} failed")
    return item * 10


def test_small_tasks_are_done_again_too(ray_cluster, tmp_path, notes):
    ctx = Context(Store(str(tmp_path)), ComputeSettings(), notes)
    assert list(run_tasks(ctx, partial(_unreached_twice, str(tmp_path)), [1, 2, 3])) == [10, 20, 30]
    assert len(notes.noted) == 6
