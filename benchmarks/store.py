"""What the store costs: requests, and runs with nothing to do.

    python benchmarks/store.py --dir FOLDER --json OUT [--stage commit,jobs,nothing]

FOLDER is on local disk. S3 is moto's server on loopback behind a proxy
that counts requests. Stages:

* commit: requests to make an artifact of n parts, against a bare put of the same bytes.
* jobs: requests of a whole select job on pools of 1, 2 and 4 times the shards.
* nothing: a finished job over 10,000 files run again, in a fresh process, after its imports.
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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from processes import Stages, Ways, in_fresh_process, run_stages

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))

NUM_FILES = 10_000
ROUNDS = 3
LIMITS = {
    "commit: requests beyond a part": 1.0,
    "commit: requests beyond an artifact": 3.0,
    "nothing, local: s": 5.0,
    "nothing, S3: requests": 20 + 10 + NUM_FILES / 1000,
}


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
            in_fresh_process(__file__, "--way", "commit", "--uri", uri, AWS_ENDPOINT_URL=proxy.url)
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
    seconds = [
        in_fresh_process(__file__, "--way", "again", "--spec", local)["s"] for _ in range(ROUNDS)
    ]
    with s3_server() as server, FaultProxy(server) as proxy:
        s3 = s3_client(server)
        s3.create_bucket(Bucket="nothing")
        for path in sorted((place / "pool").glob("*.jsonl")):
            s3.put_object(Bucket="nothing", Key=f"pool/{path.name}", Body=path.read_bytes())
        remote = small_job(place, "s3://nothing/store", pool={"path": "s3://nothing/pool"})
        run_cli(remote, AWS_ENDPOINT_URL=server)
        again = in_fresh_process(
            __file__, "--way", "again", "--spec", remote, AWS_ENDPOINT_URL=proxy.url
        )
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
    from stillhouse.jobs.progress import Lines
    from stillhouse.jobs.run import run_job
    from stillhouse.jobs.spec_file import load_spec

    started = time.perf_counter()
    result = run_job(load_spec(options.spec, []), Lines())
    seconds = time.perf_counter() - started
    if result["status"] != "nothing_to_do":
        sys.exit(f"the second run did something: {result['status']}")
    return {"s": seconds}


STAGES: Stages = {"commit": measure_commit, "jobs": measure_jobs, "nothing": measure_nothing}
WAYS: Ways = {"commit": way_commit, "again": way_again}

if __name__ == "__main__":
    run_stages(STAGES, WAYS, LIMITS, {})
