"""How the cost of a select job grows with its pool, counted between the job and its store.

    python benchmarks/scale.py --dir FOLDER --json OUT [--stage growth,shard,again]

Pools of tiny parts on an S3 server (moto, on loopback) behind a proxy that counts requests and
bytes; models are given, so that nothing is trained. Stages:

* growth: pools of three sizes. Requests and bytes by step, the exponent of their growth between
  the last two, requests a part and a further part, and memory of the driver a part.
* shard: the largest pool with 1 % more files, one of them the first in the order: what that costs
  beside the first run.
* again: the same spec once more: what a run costs that finds everything.

The stages share their stores: `shard` and `again` need `growth` before them.
"""

import argparse
import json
import math
import shutil
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import store as s3
from fault_proxy import FaultProxy
from processes import Stages, Ways, in_fresh_process, is_small, memory_mb, run_stages

FILES = (16, 64, 128) if is_small() else (30, 120, 480)
DOCUMENTS = 10
LIMITS = {
    "growth: largest exponent": 1.05,
    "growth: requests a part": 20.0,
    "growth: driver, kB a part": 2.0,
    "shard: share of requests": 0.03,
    "shard: share of bytes": 0.03,
}


class CountingProxy(FaultProxy):
    """Keeps the time of every request, and of the bytes to and from the server."""

    def __init__(self, target: str) -> None:
        super().__init__(target)
        self.log: list[tuple[float, int, int, int]] = []

    def decide(self, method: str, path: str) -> None:
        self.log.append((time.time(), 1, 0, 0))

    def passed_on(self, sent: int, received: int) -> None:
        self.log.append((time.time(), 0, sent, received))


class _Services:
    """One server and proxy for all stages."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self.endpoint = self._stack.enter_context(s3.s3_server())
        self.proxy = self._stack.enter_context(CountingProxy(self.endpoint))
        self.client = s3.s3_client(self.endpoint)
        self.client.create_bucket(Bucket="scale")
        self.first: dict[str, Any] = {}

    def put_pool(self, numbers: range, place: str, names: str = "{:06d}") -> None:
        from small import STYLES, rows

        for number in numbers:
            found = rows(number, DOCUMENTS, list(STYLES), prefix=f"{number}-")
            if number % 7 == 3:  # a copy of a document of an earlier file
                found[0]["text"] = rows(number - 3, 1, list(STYLES))[0]["text"]
            text = "".join(json.dumps(row) + "\n" for row in found)
            key = f"{place}/pool/{names.format(number)}.jsonl"
            self.client.put_object(Bucket="scale", Key=key, Body=text.encode())


@cache
def services() -> _Services:
    return _Services()


def measured(spec: str) -> dict[str, Any]:
    """Run a spec in a process of its own; requests and bytes in all and by step."""
    proxy = services().proxy
    proxy.log.clear()
    found = in_fresh_process(__file__, "--way", "run", "--spec", spec, AWS_ENDPOINT_URL=proxy.url)
    steps: dict[str, Counter[str]] = {}
    marks = [(0.0, "before"), *found["marks"], (math.inf, "")]
    at = 0
    for when, asked, sent, received in sorted(proxy.log):
        while when >= marks[at + 1][0]:
            at += 1
        counts = steps.setdefault(marks[at][1], Counter())
        counts["requests"] += asked
        counts["written"] += sent
        counts["read"] += received
    total = sum(steps.values(), Counter[str]())
    return {
        "parts": found["parts"],
        "seconds": found["seconds"],
        "driver MB": found["driver MB"],
        "status": found["status"],
        **total,
        "steps": {name: dict(counts) for name, counts in steps.items()},
    }


def spec_of(folder: Path, files: int) -> str:
    """A spec of the pool of `files` files, its path."""
    uri = f"s3://scale/{files}"
    pool = {"path": f"{uri}/pool/*.jsonl"}
    return s3.small_job(folder, f"{uri}/store", pool=pool, part_tokens=1024)


def measure_growth(folder: Path) -> dict[str, Any]:
    from small import make_world

    shutil.rmtree(folder / "growth", ignore_errors=True)
    place = make_world(folder / "growth", shards=1)
    found: dict[str, Any] = {}
    for files in FILES:
        services().put_pool(range(files), str(files))
        found[str(files)] = one = measured(spec_of(place, files))
        print(files, {k: v for k, v in one.items() if k != "steps"}, flush=True)
    services().first = last = found[str(FILES[-1])]
    before = found[str(FILES[-2])]
    ratio = math.log(last["parts"] / before["parts"])
    further = (last["requests"] - before["requests"]) / (last["parts"] - before["parts"])
    exponents = {
        f"{step}: {what}": math.log(counts[what] / before["steps"][step][what]) / ratio
        for step, counts in last["steps"].items()
        for what in counts
        # what a step costs whatever its parts is not what grows
        if before["steps"].get(step, {}).get(what, 0) > {"requests": 500}.get(what, 200_000)
    }
    more = last["parts"] - found[str(FILES[0])]["parts"]
    memory = last["driver MB"] - found[str(FILES[0])]["driver MB"]
    return found | {
        "exponents": exponents,
        "largest exponent": max(exponents.values(), default=0.0),
        "requests a part": last["requests"] / last["parts"],
        "requests a further part": further,
        "driver, kB a part": 1000 * memory / more,
    }


def measure_shard(folder: Path) -> dict[str, Any]:
    files, first = FILES[-1], services().first
    more = max(1, files // 100)
    services().put_pool(range(files, files + 1), str(files), "000000-{:06d}")
    services().put_pool(range(files + 1, files + more), str(files))
    found = measured(spec_of(folder / "growth", files))
    both = [one["read"] + one["written"] for one in (found, first)]
    return found | {
        "share of requests": found["requests"] / first["requests"],
        "share of bytes": both[0] / both[1],
    }


def measure_again(folder: Path) -> dict[str, Any]:
    return measured(spec_of(folder / "growth", FILES[-1]))


def way_run(options: argparse.Namespace) -> dict[str, Any]:
    """A job with the times at which its steps begin."""
    import ray

    from stillhouse.jobs.run import run_job
    from stillhouse.jobs.spec_file import load_spec
    from stillhouse.pipelines.context import Listener

    marks: list[tuple[float, str]] = []

    class Marks(Listener):
        def begin(self, step: str, total: int, reused: int, unit: str) -> None:
            marks.append((time.time(), step))

        def end(self, step: str, seconds: float) -> None:
            marks.append((time.time(), f"after {step}"))

    folder = tempfile.mkdtemp(prefix="sh-")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
    started = time.time()
    result = run_job(load_spec(options.spec, []), Marks())
    seconds, memory = time.time() - started, memory_mb("VmHWM")
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
    parts = result.get("work", {}).get("score prior", {}).get("parts", 0)
    return {
        "marks": marks,
        "parts": parts,
        "seconds": seconds,
        "driver MB": memory,
        "status": result["status"],
    }


STAGES: Stages = {"growth": measure_growth, "shard": measure_shard, "again": measure_again}
WAYS: Ways = {"run": way_run}

if __name__ == "__main__":
    run_stages(STAGES, WAYS, LIMITS, {})
