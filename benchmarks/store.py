"""What the store costs: requests, runs with nothing to do, reading, and memory.

    python benchmarks/store.py --dir FOLDER --json OUT [--stage commit,jobs,nothing,reading,memory]

FOLDER should be on local disk with 8 GB to spare. S3 is moto's server on loopback behind a proxy
that counts requests. Stages:

* commit: requests to make an artifact of n parts, against a bare put of the same bytes.
* jobs: requests of a whole select job on pools of 1, 2 and 4 times the shards.
* nothing: a finished job over 10,000 files run again, in a fresh process, after its imports.
* reading: `to_torch()` against a bare pyarrow loop over the same files, taken in turn.
* memory: peak of tokenising one file and of scoring its parts, at 1 and 8 times the size.
"""

import argparse
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))

LENGTH = 128
BATCH = 64
NUM_FILES = 10_000
ROUNDS = 3
LIMITS = {
    "commit: requests beyond a part": 1.0,
    "commit: requests beyond an artifact": 3.0,
    "nothing, local: s": 5.0,
    "nothing, S3: requests": 20 + 10 + NUM_FILES / 1000,
    "reading: memory, MB": 300.0,
}
FLOORS = {"reading: of a bare loop's rows/s": 0.9}


def memory_mb(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1000


@contextmanager
def s3_server() -> Iterator[str]:
    """The endpoint of an S3 server, its keys in the environment."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    os.environ.update(keys, AWS_DEFAULT_REGION="us-east-1")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def s3_client(endpoint: str) -> Any:
    """boto3's client, for buckets and uploads that are not counted."""
    import boto3

    return boto3.client("s3", endpoint_url=endpoint)


def in_fresh_process(*arguments: str, **environment: str) -> dict[str, Any]:
    """One of the ways below in a process of its own, which prints its result as JSON."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=os.environ | environment)
    return json.loads(done.stdout)


# commit


def measure_commit(folder: Path) -> dict[str, float]:
    """Requests for artifacts of 10 and 100 parts: their slope and what is left at none."""
    from fault_proxy import FaultProxy

    requests: dict[int, int] = {}
    with s3_server() as server, FaultProxy(server) as proxy:
        s3_client(server).create_bucket(Bucket="commit")
        for count in (10, 100):
            before = len(proxy.requests)
            uri = f"s3://commit/{count}"
            in_fresh_process("--way", "commit", "--uri", uri, AWS_ENDPOINT_URL=proxy.url)
            requests[count] = len(proxy.requests) - before
    slope = (requests[100] - requests[10]) / 90
    return {
        "requests, 10 parts": requests[10],
        "requests, 100 parts": requests[100],
        "requests beyond a part": slope - 1,
        "requests beyond an artifact": requests[10] - 10 * slope,
    }


def way_commit(options: argparse.Namespace) -> dict[str, Any]:
    """An artifact as any step makes it: parts with their receipts, then the manifest."""
    from stillhouse.storage.artifact import Manifest, Receipt, Store
    from stillhouse.storage.filesystem import use_options

    use_options(options.uri, {})
    store, parts = Store(options.uri), []
    for number in range(int(options.uri.rsplit("/", 1)[1])):
        table = pa.table({"x": np.arange(number, number + 1000)})
        parts.append(store.put_part(f"tokens/parts/{number}.parquet", table, num_tokens=1000))
        store.put_receipt("tokens", Receipt(str(number), (parts[-1],)))
    store.put_manifest(Manifest("tokens", "a", tuple(parts), {}, {}))
    return {}


# jobs


def small_job(folder: Path, store: str, **changes: Any) -> str:
    """Write a spec with models given by path, so that nothing is trained; its path."""
    from small import make_models, small_spec

    if not (folder / "tokenizer").exists():
        make_models(folder)
    models = {n: {"path": str(folder / n)} for n in ("tokenizer", "prior", "conditional")}
    compute = {"scorers": 2, "packers": 2, "trainers": 1}
    spec = small_spec(folder, **models, store=store, compute=compute, **changes)
    path = folder / f"spec-{abs(hash(store))}.yaml"
    path.write_text(yaml.safe_dump(spec))
    return str(path)


def run_cli(spec: str, **environment: str) -> dict[str, Any]:
    """`stillhouse run --json` in a process and a Ray of its own."""
    ray_folder = tempfile.mkdtemp(prefix="sh-")
    ray = {"RAY_TMPDIR": ray_folder, "RAY_worker_niceness": "0"}
    command = [str(Path(sys.executable).with_name("stillhouse")), "run", spec, "--json"]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, env=os.environ | environment | ray
    )
    shutil.rmtree(ray_folder, ignore_errors=True)
    return json.loads(done.stdout)


def measure_jobs(folder: Path) -> dict[str, Any]:
    """Requests of whole jobs on S3 by method, at 1, 2 and 4 times the shards."""
    from fault_proxy import FaultProxy
    from small import make_world

    found: dict[str, Any] = {}
    with s3_server() as server, FaultProxy(server) as proxy:
        s3_client(server).create_bucket(Bucket="jobs")
        for shards in (4, 8, 16):
            place = folder / f"jobs-{shards}"
            shutil.rmtree(place, ignore_errors=True)
            spec = small_job(make_world(place, shards=shards), f"s3://jobs/{shards}")
            before = len(proxy.requests)
            result = run_cli(spec, AWS_ENDPOINT_URL=proxy.url)
            methods = Counter(method for method, _ in proxy.requests[before:])
            found[f"{shards} shards"] = {
                "requests": sum(methods.values()),
                "parts": sum(w["parts"] for s, w in result["work"].items() if s != "scores"),
                **methods,
            }
    first, second, third = found.values()
    growth = [b["requests"] - a["requests"] for a, b in ((first, second), (second, third))]
    return found | {"growth of the second doubling over the first": growth[1] / growth[0]}


# nothing to do


def measure_nothing(folder: Path) -> dict[str, Any]:
    """A finished job over 10,000 files, run again: seconds on local disk, requests on S3."""
    from fault_proxy import FaultProxy
    from small import make_world

    place = folder / "nothing"
    if not (place / "pool" / f"{NUM_FILES - 1:05d}.jsonl").exists():
        write_many(make_world(place, shards=1) / "pool")
    pool = {"path": str(place / "pool" / "*.jsonl")}
    local = small_job(place, str(place / "store"), pool=pool)
    first = run_cli(local)
    seconds = [in_fresh_process("--way", "again", "--spec", local)["s"] for _ in range(ROUNDS)]
    with s3_server() as server, FaultProxy(server) as proxy:
        s3 = s3_client(server)
        s3.create_bucket(Bucket="nothing")
        for path in sorted((place / "pool").glob("*.jsonl")):
            s3.put_object(Bucket="nothing", Key=f"pool/{path.name}", Body=path.read_bytes())
        remote = small_job(place, "s3://nothing/store", pool={"path": "s3://nothing/pool"})
        run_cli(remote, AWS_ENDPOINT_URL=server)
        again = in_fresh_process("--way", "again", "--spec", remote, AWS_ENDPOINT_URL=proxy.url)
        requests = Counter(method for method, _ in proxy.requests)
    return {
        "files": NUM_FILES,
        "documents": first["selection"]["fates"],
        "local: s": statistics.median(seconds),
        "local: s of each": seconds,
        "S3: s": again["s"],
        "S3: requests": sum(requests.values()),
        "S3: by method": dict(requests),
    }


def write_many(folder: Path) -> None:
    """10,000 JSON Lines files of one document each."""
    from small import STYLES, rows

    for number, row in enumerate(rows(5, NUM_FILES, list(STYLES))):
        (folder / f"{number:05d}.jsonl").write_text(json.dumps(row) + "\n")


def way_again(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds from the spec to `nothing_to_do`, imports not counted."""
    from jobs.progress import Lines
    from jobs.run import run_job
    from jobs.spec_file import load_spec

    started = time.perf_counter()
    result = run_job(load_spec(options.spec, []), Lines())
    seconds = time.perf_counter() - started
    if result["status"] != "nothing_to_do":
        sys.exit(f"the second run did something: {result['status']}")
    return {"s": seconds}


# reading


def measure_reading(folder: Path) -> dict[str, Any]:
    """Both ways in turn, each in a fresh process, over a selection of 2 GB in the page cache."""
    uri = write_selection(folder / "reading", num_parts=64, rows=128_000)
    found: dict[str, list[dict[str, Any]]] = {"bare": [], "to_torch": []}
    for _ in range(ROUNDS + 1):
        for way in found:
            found[way].append(in_fresh_process("--way", way, "--uri", uri))
    ratios = [
        ours["rows_per_s"] / bare["rows_per_s"]
        for bare, ours in zip(found["bare"][1:], found["to_torch"][1:], strict=True)
    ]
    if len({run["sum"] for runs in found.values() for run in runs}) != 1:
        sys.exit("the two ways read different rows")
    return {
        "bytes": sum(path.stat().st_size for path in (folder / "reading").rglob("part-*")),
        "bare loop: rows/s": statistics.median(r["rows_per_s"] for r in found["bare"][1:]),
        "to_torch: rows/s": statistics.median(r["rows_per_s"] for r in found["to_torch"][1:]),
        "of a bare loop's rows/s": statistics.median(ratios),
        "ratios": ratios,
        "memory, MB": max(run["memory_mb"] for run in found["to_torch"]),
        "bare loop: memory, MB": max(run["memory_mb"] for run in found["bare"]),
    }


def write_selection(folder: Path, num_parts: int, rows: int) -> str:
    """A selection of random sequences; its URI."""
    from stillhouse.storage.artifact import Manifest, Store

    store, parts = Store(str(folder)), []
    for number in range(num_parts):
        ids = np.random.default_rng(number).integers(0, 65536, rows * LENGTH, dtype=np.uint16)
        table = pa.table({"input_ids": pa.FixedSizeListArray.from_arrays(pa.array(ids), LENGTH)})
        path = f"selections/s/part-{number:05d}.parquet"
        parts.append(store.put_part(path, table, num_tokens=len(ids)))
    store.put_manifest(Manifest("selections", "s", tuple(parts), {}, {}))
    return store.path("selections", "s")


def way_bare(options: argparse.Namespace) -> dict[str, Any]:
    """What anyone would write: row groups to int64 batches of torch."""
    import torch

    def batches() -> Iterator[Any]:
        for path in sorted(Path(options.uri).glob("part-*.parquet")):
            file = pq.ParquetFile(path)
            for group in range(file.num_row_groups):
                column = file.read_row_group(group, columns=["input_ids"])["input_ids"]
                values = column.combine_chunks().flatten().to_numpy()
                yield from torch.from_numpy(values.reshape(-1, LENGTH).astype(np.int64)).split(
                    BATCH
                )

    return _consume(batches)


def way_to_torch(options: argparse.Namespace) -> dict[str, Any]:
    """The same by the library's reader."""
    from stillhouse import open_selection

    dataset = open_selection(options.uri).to_torch(batch_size=BATCH)
    return _consume(lambda: (batch["input_ids"] for batch in dataset))


def _consume(batches: Callable[[], Iterator[Any]]) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    before, started = memory_mb("VmRSS"), time.perf_counter()
    rows = total = 0
    for batch in batches():
        rows += len(batch)
        total += int(batch[:, 0].sum())
    seconds = time.perf_counter() - started
    return {
        "rows_per_s": rows / seconds,
        "sum": total,
        "memory_mb": memory_mb("VmHWM") - before,
    }


# memory


def measure_memory(folder: Path) -> dict[str, Any]:
    """Peak memory above the imports of packing one large file and scoring its parts."""
    found: dict[str, Any] = {}
    for size in (1, 8):
        place = folder / f"memory-{size}"
        write_large(place, size)
        for way in ("pack", "score"):
            found[f"{way}, {size}x: MB"] = in_fresh_process("--way", way, "--uri", str(place))[
                "memory_mb"
            ]
    for way in ("pack", "score"):
        found[f"{way}: 8x over 1x"] = found[f"{way}, 8x: MB"] / found[f"{way}, 1x: MB"]
    return found


def write_large(place: Path, size: int) -> None:
    """One compressed JSON Lines file of `size` times 30 MB of text, and models."""
    import gzip

    from small import STYLES, make_models, rows

    if (place / "prior").exists():
        return
    place.mkdir(parents=True)
    block = rows(5, 8000, list(STYLES))
    with gzip.open(place / "pool.jsonl.gz", "wt", compresslevel=1) as file:
        for copy in range(10 * size):
            for row in block:
                file.write(json.dumps(row | {"text": f"{copy} {row['text']}"}) + "\n")
    make_models(place)


def _unit(place: Path) -> Any:
    from stillhouse.spec import DataSource
    from stillhouse.text.tasks import UnitFile, UnitTask

    path = str(place / "pool.jsonl.gz")
    return UnitTask("0" * 64, 0, (UnitFile(path, "0" * 64, None),), DataSource(path=path))


def way_pack(options: argparse.Namespace) -> dict[str, Any]:
    """Tokenise and pack the file in parts of a million tokens."""
    from stillhouse.storage.artifact import Store
    from stillhouse.text.tasks import PackTask, pack_unit
    from stillhouse.text.tokenizer import load_tokenizer

    pa.set_memory_pool(pa.system_memory_pool())  # gives back what it frees
    place = Path(options.uri)
    shutil.rmtree(place / "store", ignore_errors=True)
    tokenizer = load_tokenizer(str(place / "tokenizer"), None)
    task = PackTask(_unit(place), (), 32, 31_250)
    before = memory_mb("VmRSS")
    receipt = pack_unit(Store(str(place / "store")), tokenizer, task)
    return {"memory_mb": memory_mb("VmHWM") - before, "parts": len(receipt.parts)}


def way_score(options: argparse.Namespace) -> dict[str, Any]:
    """Score all of its parts, one after the other, as a Scorer actor does."""
    import torch

    from actors.scorer import ScorerHost, ScorerSettings
    from stillhouse.selection.scorers import score_task
    from stillhouse.spec import ScoringSettings
    from stillhouse.storage.artifact import PartRef, Store

    torch.set_num_threads(1)
    pa.set_memory_pool(pa.system_memory_pool())
    place = Path(options.uri)
    store = Store(str(place / "store"))
    paths = sorted((place / "store" / "tokens" / "parts").glob("*.parquet"))
    parts = [
        PartRef(f"tokens/parts/{p.name}", pq.read_metadata(p).num_rows, 0, 0, p.stem) for p in paths
    ]
    settings = ScorerSettings(
        "causal_lm", str(place / "prior"), "", "", ScoringSettings(), "cpu", 0.0, 1
    )
    host = ScorerHost(store, settings)
    before = memory_mb("VmRSS")
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        host.run(score_task("s" * 64, part))
        if following is not None:
            host.prefetch(score_task("s" * 64, following))
    return {"memory_mb": memory_mb("VmHWM") - before, "parts": len(parts)}


STAGES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "commit": measure_commit,
    "jobs": measure_jobs,
    "nothing": measure_nothing,
    "reading": measure_reading,
    "memory": measure_memory,
}
WAYS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "commit": way_commit,
    "again": way_again,
    "bare": way_bare,
    "to_torch": way_to_torch,
    "pack": way_pack,
    "score": way_score,
}


def main() -> None:
    """Run the stages, print each as it is done, and say which limits are missed."""
    parser = argparse.ArgumentParser(description="What the store costs")
    parser.add_argument("--dir", type=Path, default=Path("bench_files"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--stage", default=",".join(STAGES))
    for hidden in ("--way", "--uri", "--spec"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(WAYS[options.way](options)))
        return
    folder = options.dir.resolve()
    found = {}
    for stage in options.stage.split(","):
        found[stage] = STAGES[stage](folder)
        print(json.dumps({stage: found[stage]}, indent=1), flush=True)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")
    flat = {f"{s}: {n}": v for s, figures in found.items() for n, v in figures.items()}
    missed = [
        f"{n} {flat[n]:.3g} > {limit:g}" for n, limit in LIMITS.items() if flat.get(n, 0) > limit
    ]
    missed += [
        f"{n} {flat[n]:.3g} < {floor:g}"
        for n, floor in FLOORS.items()
        if n in flat and flat[n] < floor
    ]
    print("missed: " + ("; ".join(missed) or "none"))


if __name__ == "__main__":
    main()
