"""Parts through a real actor pool: order, reuse, errors, and workers that die."""

import os
import sys
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import pytest
from ray import cloudpickle
from small import Quiet

from stillhouse.errors import InputError, PartFailedError
from stillhouse.pipelines.context import Context, Unfinished
from stillhouse.pipelines.flow import run_tasks, stream_parts
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
