"""What a large cluster asks of the driver, and what a scheduled run with nothing to do costs.

    python benchmarks/cluster.py --dir FOLDER --json OUT [--stage driver,records,nothing,submit]

FOLDER is on local disk. Stages:

* driver: 100,000 parts through `stillhouse.pipelines.context.perform` on workers that are done with
  each at once: parts a second, the driver's memory and CPU time.
* records: the store's side of 100,000 parts: receipts found again, a manifest written and read.
* nothing: a finished, published job on S3 (moto behind a proxy that counts) run again by the
  command line: seconds from the process's start to its end, requests.
* submit: a job submitted to a head with a token: seconds until its first part is done, beyond those
  of a bare Ray job that says hello.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from processes import Stages, Ways, in_fresh_process, memory_mb, run_stages
from store import run_cli, s3_client, s3_server, small_job
from submit import measure_submit

from stillhouse.fingerprint import canonical_json, fingerprint
from stillhouse.storage.artifact import Manifest, PartRef, Receipt, Store
from stillhouse.storage.task import Output, Task

NUM_PARTS = 100_000
PART_TOKENS = 16_000_000
WORKERS = 2
NUM_FILES = 1_000
MOST_S = 3_600.0
"""A machine that is slower ends here: the rate is then that of the parts that were done."""
NEEDED = 512 * 700_000 / PART_TOKENS
"""Parts a second that 512 GPUs consume at 0.7 M tokens a second each."""
LIMITS = {
    "driver: memory growth, MB": 500.0,
    "nothing: s": 10.0,
    "submit: s beyond a bare job": 15.0,
    "nothing: requests beyond artifacts and files / 1000": 20.0,
}
FLOORS = {"driver: parts a second over those of 512 GPUs": 5.0}


def part_ref(number: int) -> PartRef:
    """A token part of the size that `part_tokens` asks for."""
    name = fingerprint(["part", number])
    path = f"tokens/parts/{name}-0.parquet"
    return PartRef(path, PART_TOKENS // 512, PART_TOKENS, 2 * PART_TOKENS, name)


@dataclass(frozen=True)
class InstantTask(Task):
    """A part to score that is done at once: it says what a Scorer would say."""

    KIND = "scores"
    part: PartRef

    def run(self, store: Store, host: Any, loaded: Any) -> Output:
        """Counts and libraries."""
        counts = {"tokens": self.part.num_tokens, "sequences": self.part.num_rows, "nan": 0}
        return Output((), counts, {"libraries": {"torch": "2.13.0"}})


class InstantStore(Store):
    """A store that writes no receipt; each is as large as that of a scored part."""

    def put_receipt(self, kind: str, receipt: Receipt) -> Receipt:
        """The receipt of a task with one part."""
        return replace(receipt, parts=(part_ref(0),))


def score_tasks(count: int, start: int = 0) -> list[InstantTask]:
    """Descriptors of parts to score."""
    return [InstantTask(part_ref(n)) for n in range(start, start + count)]


# driver


class TimeIsUp(Exception):
    """Raised in the driver's loop."""


class Watch:
    """A listener that counts, passes on, and ends a step that takes too long."""

    def __init__(self, shown: Any) -> None:
        self._shown = shown
        self.done = 0
        self._started = 0.0

    def begin(self, step: str, total: int, reused: int, unit: str) -> None:
        """A step starts."""
        self.done, self._started = 0, time.perf_counter()
        self._shown.begin(step, total, reused, unit)

    def advance(self, step: str, done: float, amount: float) -> None:
        """More is done."""
        self._shown.advance(step, done, amount)
        self.done += int(done)
        if self.done == 1:  # the pool is up
            self._started = time.perf_counter()
        if self.seconds > MOST_S:
            raise TimeIsUp

    @property
    def seconds(self) -> float:
        """Since the first part."""
        return time.perf_counter() - self._started

    def end(self, step: str, seconds: float) -> None:
        """A step is complete."""
        self._shown.end(step, seconds)

    def note(self, kind: str, content: dict[str, Any]) -> None:
        """Anything else."""
        self._shown.note(kind, content)


def measure_driver(folder: Path) -> dict[str, Any]:
    """In a process and a Ray of its own."""
    shutil.rmtree(folder / "driver", ignore_errors=True)
    return in_fresh_process(
        __file__, "--way", "driver", "--uri", str(folder / "driver"), RAY_worker_niceness="0"
    )


def way_driver(options: argparse.Namespace) -> dict[str, Any]:
    """A first step of few parts brings in what is imported, the second is measured."""
    import ray

    from stillhouse.jobs.progress import Lines, Recorder
    from stillhouse.pipelines.context import Context, Step, perform
    from stillhouse.spec import ComputeSettings
    from stillhouse.storage.run_record import RunRecord

    ray.init(
        address="local",
        num_cpus=WORKERS,
        include_dashboard=False,
        object_store_memory=300_000_000,
        log_to_driver=False,
    )
    store = InstantStore(options.uri)
    record = RunRecord(store, "benchmark")
    record.start("job: benchmark\n", "select")
    watch = Watch(Recorder(Lines(), record))
    ctx = Context(store, ComputeSettings(), watch, run="benchmark")

    def score(title: str, tasks: list[InstantTask]) -> list[Receipt]:
        return perform(ctx, Step(title, tasks, workers=WORKERS))

    score("score prior", score_tasks(100, NUM_PARTS))
    before = memory_mb("VmRSS")
    tasks = score_tasks(NUM_PARTS)
    described = memory_mb("VmRSS")
    busy = time.process_time()
    with suppress(TimeIsUp):
        receipts = score("score conditional", tasks)
        if [r.task for r in receipts] != [t.fingerprint for t in tasks]:
            sys.exit("not every part came back, in order")
    rate = watch.done / watch.seconds
    cost = (time.process_time() - busy) / watch.done
    found = {
        "descriptors": NUM_PARTS,
        "parts done": watch.done,
        "s from the first part": watch.seconds,
        "parts a second": rate,
        "parts a second over those of 512 GPUs": rate / NEEDED,
        "CPU milliseconds a part": 1000 * cost,
        "descriptors, MB": described - before,
        "memory growth, MB": memory_mb("VmHWM") - before,
        "peak, MB": memory_mb("VmHWM"),
        "load": os.getloadavg()[0],
    }
    ray.shutdown()
    return found


# records


def measure_records(folder: Path) -> dict[str, Any]:
    """In a process of its own."""
    place = folder / "records"
    shutil.rmtree(place, ignore_errors=True)
    found = in_fresh_process(__file__, "--way", "records", "--uri", str(place))
    shutil.rmtree(place)
    return found


def way_records(options: argparse.Namespace) -> dict[str, Any]:
    """Receipts on local disk, put there without a commit, whose parts are empty files."""
    store, tasks = Store(options.uri), score_tasks(NUM_PARTS)
    for place in ("tokens/parts", "scores/receipts"):
        Path(store.path(place)).mkdir(parents=True)
    for task in tasks:
        made = task.run(store, None, None)
        made = Receipt(task.fingerprint, (task.part,), dict(made.counts), dict(made.info))
        receipt = canonical_json(asdict(made))
        Path(store.path("scores/receipts", f"{task.fingerprint}.json")).write_bytes(receipt)
        Path(store.path(task.part.path)).touch()
    before, started = memory_mb("VmRSS"), time.perf_counter()
    done = store.finished("scores", [task.fingerprint for task in tasks])
    found = {"receipts found again, s": time.perf_counter() - started}
    if len(done) != NUM_PARTS:
        sys.exit(f"{len(done)} receipts found")
    found["receipts found again, MB"] = memory_mb("VmHWM") - before
    parts = tuple(task.part for task in tasks)
    started = time.perf_counter()
    store.put_manifest(Manifest("scores", "a", parts, {}, {}))
    found["manifest written, s"] = time.perf_counter() - started
    started = time.perf_counter()
    store.get_manifest("scores", "a")
    found["manifest read, s"] = time.perf_counter() - started
    files = Path(store.path("scores", "a")).iterdir()
    found["manifest, MB"] = sum(file.stat().st_size for file in files) / 1e6
    found["peak of all, MB above imports"] = memory_mb("VmHWM") - before
    return found


# nothing to do


def measure_nothing(folder: Path) -> dict[str, Any]:
    """A job on S3 over 1,000 files, then again."""
    from fault_proxy import FaultProxy
    from small import STYLES, make_world, rows

    place = folder / "nothing"
    make_world(place, shards=1)
    with s3_server() as server, FaultProxy(server) as proxy:
        s3 = s3_client(server)
        s3.create_bucket(Bucket="nothing")
        for number, row in enumerate(rows(5, NUM_FILES, list(STYLES))):
            body = json.dumps(row).encode()
            s3.put_object(Bucket="nothing", Key=f"pool/{number:05d}.jsonl", Body=body)
        spec = small_job(
            place, "s3://nothing/store", pool={"path": "s3://nothing/pool"}, publish="nightly"
        )
        first = run_cli(spec, AWS_ENDPOINT_URL=server)
        started = time.perf_counter()
        again = run_cli(spec, AWS_ENDPOINT_URL=proxy.url)
        seconds = time.perf_counter() - started
        requests = Counter(method for method, _ in proxy.requests)
    if (again["status"], again["published"]["new"]) != ("nothing_to_do", False):
        sys.exit(f"the second run did something: {again['status']}")
    total, artifacts = sum(requests.values()), len(first["artifacts"])
    return {
        "files": NUM_FILES,
        "artifacts": artifacts,
        "s": seconds,
        "requests": total,
        "by method": dict(requests),
        "requests beyond artifacts and files / 1000": total - artifacts - NUM_FILES / 1000,
    }


STAGES: Stages = {
    "driver": measure_driver,
    "records": measure_records,
    "nothing": measure_nothing,
    "submit": measure_submit,
}
WAYS: Ways = {"driver": way_driver, "records": way_records}

if __name__ == "__main__":
    run_stages(STAGES, WAYS, LIMITS, FLOORS)
