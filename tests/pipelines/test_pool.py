"""Tasks through real workers: order, reuse, errors, and workers that die."""

import os
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread

import pyarrow as pa
import pytest
from ray import cloudpickle
from small import Quiet

from stillhouse.errors import ClusterError, InputError, PartFailedError, StoreUnreachableError
from stillhouse.pipelines.context import Context, Step, Unfinished, perform, run_tasks
from stillhouse.pipelines.pool import STORAGE_BUDGET
from stillhouse.spec import ComputeSettings
from stillhouse.storage.artifact import Store
from stillhouse.storage.parquet import read_table
from stillhouse.storage.task import Output, Place, Task

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests


@dataclass(frozen=True)
class Thing(Task):
    """Makes a part of its name, but for the names that say what goes wrong."""

    KIND = "things"
    name: str
    folder: Place[str]

    def tokens_in(self, table):
        return table.num_rows

    def load(self, store):
        return self.note("loaded")

    def run(self, store, host, loaded):
        tries = self.note("begun")
        if self.name == "poison" or (self.name == "once" and tries == 1):
            os._exit(1)
        if self.name == "bad":
            raise InputError("bad is bad")
        if self.name == "bug":
            raise ZeroDivisionError("who divides?")
        if self.name == "lacks":
            import h7_lacking  # noqa: F401  # pyright: ignore
        if self.name.startswith("unreachable") or (self.name == "slow store" and tries < 3):
            raise StoreUnreachableError(f"writing {self.name} failed")
        if self.name.startswith("wait"):
            until(lambda: Path(self.folder, "go").exists())
        self.note("done")
        table = pa.table({"name": [self.name], "host": [str(host)]})
        return Output([table], {"tokens": 1}, {"pid": os.getpid()})

    def note(self, what):
        """How often this happened to the task, this time included."""
        place = Path(self.folder, f"{self.name}-{what}")
        with place.open("a") as file:
            file.write(f"{time.monotonic()}\n")
        return len(place.read_text().splitlines())


@dataclass(frozen=True)
class Named:
    """What builds a host: the text itself, noted by the process that built it."""

    text: str
    folder: str

    def build(self, store):
        with Path(self.folder, f"built-{self.text}").open("a") as file:
            file.write(f"{os.getpid()}\n")
        return self.text


def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


class Noting(Quiet):
    def __init__(self):
        super().__init__()
        self.noted = []

    def note(self, kind, content):
        self.noted.append((kind, content["message"]))


@pytest.fixture
def stream(ray_cluster, tmp_path):
    """Does things of the given names; its context can be looked at."""
    store, contexts = Store(str(tmp_path / "store")), []

    def call(*names, workers=1, dry=False, attempts=2, host=None, on=None, cpus=1):
        compute = ComputeSettings(max_attempts=attempts, cpus_per_worker=cpus)
        call.ctx = on or Context(store, compute, Noting(), dry=dry)
        contexts.append(call.ctx)
        tasks = [Thing(name, str(tmp_path)) for name in names]
        host = host and Named(host, str(tmp_path))
        call.receipts = perform(call.ctx, Step("things", tasks, host, workers))
        tables = [read_table(store.path(receipt.parts[0].path)) for receipt in call.receipts]
        return [table["name"][0].as_py() for table in tables]

    call.store, call.folder = store, tmp_path
    yield call
    for ctx in contexts:
        ctx.close_pool()


def test_results_come_in_order_and_are_found_again(stream):
    names = ["c", "a", "b", "a"]
    assert stream(*names, workers=2) == names
    assert stream.ctx.listener.steps == [("things", 4, 1)]  # the second "a" is the first
    assert stream("d", *names) == ["d", *names]
    work = stream.ctx.work["things"]
    assert (work.parts, work.reused) == (5, 4)
    assert work.device_seconds > 0
    assert sum(done for _, done, _ in stream.ctx.listener.advanced) == 1


def test_a_dry_run_stops_where_there_is_something_to_do(stream):
    with pytest.raises(Unfinished, match="things"):
        stream("a", dry=True)
    assert list(stream.store.finished("things", [Thing("a", "").fingerprint])) == []
    with pytest.raises(Unfinished):
        list(run_tasks(stream.ctx, str, [1]))


def test_workers_and_hosts_are_kept_from_step_to_step(stream):
    stream("a", "b", host="first")
    stream("c", "d", host="first", on=stream.ctx)
    stream("e", host="second", on=stream.ctx)
    pids = {receipt.info["pid"] for receipt in stream.receipts}
    built = [stream.folder / f"built-{name}" for name in ("first", "second")]
    assert [{int(pid) for pid in place.read_text().split()} for place in built] == [pids, pids]
    assert len(built[0].read_text().split()) == 1


def test_a_worker_reads_for_the_next_task_while_it_works(stream):
    """The first task ends only when another one was read for: alone it would wait for ever."""
    ctx = Context(stream.store, ComputeSettings(), Noting())

    def watch():
        until(lambda: any((stream.folder / f"{n}-loaded").exists() for n in "ab"))
        (stream.folder / "go").touch()

    thread = Thread(target=watch)
    thread.start()
    assert stream("wait", "a", "b", on=ctx) == ["wait", "a", "b"]
    thread.join()


def test_a_poison_task_is_given_up_and_named(stream):
    poison = Thing("poison", "").fingerprint
    with pytest.raises(PartFailedError, match=f"part {poison} killed its worker 2 times") as failed:
        stream("poison", "a", "b", "c")
    assert failed.value.exit_code == 4
    assert stream.ctx.failed_at.part == poison


def test_what_was_lost_with_a_worker_is_done_again(stream):
    assert stream("a", "once", "b", "c", "d") == ["a", "once", "b", "c", "d"]
    assert len((stream.folder / "once-begun").read_text().splitlines()) == 2


def test_more_workers_than_the_cluster_has_room_for(stream):
    """The cluster has four CPUs: one of three workers runs, the others wait for a node."""
    assert stream("a", "b", "c", workers=3, cpus=3) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("bad", InputError, r"^bad is bad$"),
        ("bug", RuntimeError, r"(?s)in run.*ZeroDivisionError: who divides"),
        ("lacks", ClusterError, r"^[^\n]*No module named 'h7_lacking'.*`compute.address`[^\n]*$"),
    ],
)
def test_errors_of_tasks(stream, name, error, message):
    """Our own keep their type, others bring their traceback, missing code is told in a line."""
    with pytest.raises(error, match=message):
        stream("a", name)


def test_a_task_that_cannot_reach_the_store_is_tried_again(stream):
    assert stream("a", "slow store", "b", attempts=1) == ["a", "slow store", "b"]
    assert [kind for kind, _ in stream.ctx.listener.noted] == ["waiting", "waiting"]
    assert "writing slow store failed" in stream.ctx.listener.noted[0][1]


def test_it_is_given_up_in_the_end_and_said_where(stream):
    with pytest.raises(StoreUnreachableError, match="writing unreachable failed"):
        stream("unreachable", "a")
    begun = (stream.folder / "unreachable-begun").read_text().splitlines()
    assert len(begun) == STORAGE_BUDGET
    assert stream.ctx.failed_at.part == Thing("unreachable", "").fingerprint
    assert stream.ctx.failed_at.node


def test_if_no_task_reaches_the_store_not_all_of_them_are_tried(stream):
    with pytest.raises(StoreUnreachableError):
        stream(*(f"unreachable {i}" for i in range(300)))
    assert 40 <= len(list(stream.folder.glob("unreachable*-begun"))) < 50


def unreached_twice(folder, item):
    """Fails for the first two calls of each item, as files tell."""
    for attempt in range(2):
        try:
            open(f"{folder}/{item}-{attempt}", "x").close()
        except FileExistsError:
            continue
        raise StoreUnreachableError(f"reading {item} failed")
    return item * 10


def test_small_functions_keep_the_order_and_are_called_again(ray_cluster, tmp_path):
    ctx = Context(Store(str(tmp_path)), ComputeSettings(), Noting())
    assert list(run_tasks(ctx, str, range(6), in_flight=2)) == ["0", "1", "2", "3", "4", "5"]
    assert list(run_tasks(ctx, str, [])) == []
    assert list(run_tasks(ctx, partial(unreached_twice, str(tmp_path)), [1, 2, 3])) == [10, 20, 30]
    assert len(ctx.listener.noted) == 6
    ctx.close_pool()
