"""What reading and working on parts costs: rows per second, and memory.

    python benchmarks/reading.py --dir FOLDER --json OUT [--stage reading,memory]

FOLDER is on local disk with 4 GB to spare, and is kept. Stages:

* reading: `to_torch()` against a bare pyarrow loop over the same files, taken in turn.
* memory: peak of packing one large file and of scoring its parts, at 1 and 8 times the size.
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from processes import Stages, Ways, in_fresh_process, memory_mb, run_stages

sys.path.append(str(Path(__file__).parents[1] / "tests"))

LENGTH = 128
BATCH = 64
ROUNDS = 3


def measure_reading(folder: Path) -> dict[str, Any]:
    """Both ways in turn, each in a fresh process, over a selection of 2 GB in the page cache."""
    uri = write_selection(folder / "reading", num_parts=64, rows=128_000)
    found: dict[str, list[dict[str, Any]]] = {"bare": [], "to_torch": []}
    for _ in range(ROUNDS + 1):
        for way in found:
            found[way].append(in_fresh_process(__file__, "--way", way, "--uri", uri))
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


def measure_memory(folder: Path) -> dict[str, Any]:
    """Peak memory above the imports of packing one large file and scoring its parts."""
    found: dict[str, Any] = {}
    for size in (1, 8):
        place = folder / f"memory-{size}"
        write_large(place, size)
        for way in ("pack", "score"):
            found[f"{way}, {size}x: MB"] = in_fresh_process(
                __file__, "--way", way, "--uri", str(place)
            )["memory_mb"]
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
    from stillhouse.data_settings import DataSource
    from stillhouse.text.tasks import ScanTask, UnitFile

    path = str(place / "pool.jsonl.gz")
    return ScanTask((UnitFile(path, "0" * 64, None),), DataSource(path=path))


def way_pack(options: argparse.Namespace) -> dict[str, Any]:
    """Tokenise and pack the file in parts of a million tokens."""
    from stillhouse.storage.artifact import Store
    from stillhouse.storage.task import commit
    from stillhouse.text.tasks import PackTask
    from stillhouse.text.tokenizer import load_tokenizer

    pa.set_memory_pool(pa.system_memory_pool())  # gives back what it frees
    place = Path(options.uri)
    shutil.rmtree(place / "store", ignore_errors=True)
    tokenizer = load_tokenizer(str(place / "tokenizer"), None)
    task = PackTask(_unit(place), "", tokenizer.digest, tokenizer.eos_token, 32, 31_250)
    store = Store(str(place / "store"))
    before = memory_mb("VmRSS")
    receipt = commit(store, task, task.run(store, tokenizer, None))
    return {"memory_mb": memory_mb("VmHWM") - before, "parts": len(receipt.parts)}


def way_score(options: argparse.Namespace) -> dict[str, Any]:
    """Score all of its parts as a worker does: one is scored while the next one is read."""
    import torch

    from stillhouse.selection.scorers import LanguageModelHost, ScoreTask
    from stillhouse.spec import ScoringSettings
    from stillhouse.storage.artifact import PartRef, Store
    from stillhouse.storage.task import commit

    torch.set_num_threads(1)
    pa.set_memory_pool(pa.system_memory_pool())
    place = Path(options.uri)
    store = Store(str(place / "store"))
    paths = sorted((place / "store" / "tokens" / "parts").glob("*.parquet"))
    parts = [
        PartRef(f"tokens/parts/{p.name}", pq.read_metadata(p).num_rows, 0, 0, p.stem) for p in paths
    ]
    host = LanguageModelHost(str(place / "prior"), ScoringSettings(), "cpu", 0.0, 1)
    scorer = host.build(store)
    before = memory_mb("VmRSS")
    tasks = [ScoreTask("s" * 64, part) for part in parts]
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(tasks[0].load, store)
        for task, following in zip(tasks, [*tasks[1:], None], strict=True):
            loaded = ahead.result()
            if following is not None:
                ahead = reader.submit(following.load, store)
            commit(store, task, task.run(store, scorer, loaded))
    return {"memory_mb": memory_mb("VmHWM") - before, "parts": len(parts)}


STAGES: Stages = {"reading": measure_reading, "memory": measure_memory}
WAYS: Ways = {"bare": way_bare, "to_torch": way_to_torch, "pack": way_pack, "score": way_score}
LIMITS = {"reading: memory, MB": 300.0}
FLOORS = {"reading: of a bare loop's rows/s": 0.9}

if __name__ == "__main__":
    run_stages(STAGES, WAYS, LIMITS, FLOORS)
