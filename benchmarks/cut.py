"""The exact cut over scores streamed from files, against numpy.argpartition over all of them.

    python benchmarks/cut.py --rows 200_000_000 --files 100 --dir FOLDER --json OUT

Writes the files once (kept in FOLDER: delete it afterwards), then measures each way in a fresh
process: seconds, and peak resident memory above what the imports take. Fails if the kept sets
differ or the cut needs more than 500 MB.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from processes import in_fresh_process, memory_mb

from stillhouse.selection.budget import find_cut

MAX_MEMORY_MB = 500
TAU = 8
ROW_GROUP = 131_072


def write_files(folder: Path, num_rows: int, num_files: int) -> list[Path]:
    """Normal scores like CoLoR's on the web (mean 0.73, deviation 0.15), one seed a file."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"scores-{num_rows}-{i:05d}-of-{num_files}.parquet" for i in range(num_files)]
    bounds = [num_rows * i // num_files for i in range(num_files + 1)]
    for index, path in enumerate(paths):
        if not path.exists():
            count = bounds[index + 1] - bounds[index]
            normal = np.random.default_rng(index).standard_normal(count, dtype=np.float32)
            table = pa.table({"value": normal * np.float32(0.15) + np.float32(0.73)})
            pq.write_table(table, path.with_suffix(".tmp"), row_group_size=ROW_GROUP)
            path.with_suffix(".tmp").rename(path)
    return paths


def read(path: Path) -> NDArray[np.float32]:
    """The scores of one file, a row group at a time."""
    with pq.ParquetFile(path) as file:
        values = np.empty(file.metadata.num_rows, dtype=np.float32)
        first = 0
        for index in range(file.num_row_groups):
            column = file.read_row_group(index, ["value"], use_threads=False)["value"]
            values[first : first + len(column)] = column.to_numpy()
            first += len(column)
    return values


def kept(masks: Iterable[NDArray[np.bool_]], score: float) -> dict[str, Any]:
    """What both ways have to agree on: how many, the last score, and exactly which rows."""
    digest, count = hashlib.sha256(), 0
    for mask in masks:
        digest.update(np.packbits(mask).tobytes())
        count += int(mask.sum())
    return {"count": count, "score": score, "sha256": digest.hexdigest()}


def measure_cut(paths: list[Path]) -> dict[str, Any]:
    """`find_cut` with one file in memory at a time."""
    k = sum(pq.read_metadata(path).num_rows for path in paths) // TAU
    before, start = memory_mb("VmRSS"), time.perf_counter()
    cut = find_cut({i: partial(read, path) for i, path in enumerate(paths)}, k)
    seconds = time.perf_counter() - start
    result = kept((cut.mask(i, read(path)) for i, path in enumerate(paths)), cut.score)
    return result | {"seconds": seconds, "memory_mb": memory_mb("VmHWM") - before}


def measure_argpartition(paths: list[Path]) -> dict[str, Any]:
    """One argpartition over one array; its arbitrary choice among ties is made lowest first."""
    before, start = memory_mb("VmRSS"), time.perf_counter()
    scores = np.concatenate([read(path) for path in paths])
    read_seconds = time.perf_counter() - start
    k = len(scores) // TAU
    order = np.argpartition(scores, len(scores) - k)
    seconds = time.perf_counter() - start
    last = scores[order[len(scores) - k]]
    mask = scores > last
    mask[np.flatnonzero(scores == last)[: k - int(mask.sum())]] = True
    sizes = [pq.read_metadata(path).num_rows for path in paths]
    result = kept(np.split(mask, np.cumsum(sizes)[:-1]), float(last))
    memory = memory_mb("VmHWM") - before
    return result | {"seconds": seconds, "read_seconds": read_seconds, "memory_mb": memory}


WAYS: dict[str, Callable[[list[Path]], dict[str, Any]]] = {
    "cut": measure_cut,
    "argpartition": measure_argpartition,
}


def main() -> None:
    """Measure both ways side by side and compare."""
    parser = argparse.ArgumentParser(description="find_cut against argpartition")
    parser.add_argument("--rows", type=int, default=200_000_000)
    parser.add_argument("--files", type=int, default=100)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    paths = write_files(args.dir, args.rows, args.files)
    if args.way:
        pa.set_memory_pool(pa.system_memory_pool())  # gives back what it frees
        print(json.dumps(WAYS[args.way](paths)))
        return
    size = ["--dir", str(args.dir), "--rows", str(args.rows), "--files", str(args.files)]
    result = {way: in_fresh_process(__file__, "--way", way, *size) for way in WAYS}
    cut, full = result["cut"], result["argpartition"]
    same = all(cut[key] == full[key] for key in ("count", "score", "sha256"))
    summary = {
        "rows": args.rows,
        "files": args.files,
        "same": same,
        "cut_over_argpartition": cut["seconds"] / full["seconds"],
        **result,
    }
    text = json.dumps(summary, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")
    if not same or cut["memory_mb"] > MAX_MEMORY_MB:
        sys.exit("the cut differs from argpartition, or takes too much memory")


if __name__ == "__main__":
    main()
