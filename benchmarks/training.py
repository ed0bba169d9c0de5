"""What a streamed training costs against the same steps on data in memory.

    python benchmarks/training.py --dir FOLDER --json OUT [--stage order,loop,resume]

FOLDER is on local disk, and is kept. Stages:

* order: memory of the order of 1e6 and 1e9 rows, and of the windows of a thousand steps.
* loop: `job: train` with one worker (Ray Data, Ray Train, the store) against the same batches from
  memory, in turn, each in a process of its own; both have to give the same samples and loss.
* resume: a run killed after a checkpoint, run again: seconds until it trains, beyond Ray's start.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from processes import Stages, Ways, in_fresh_process, memory_mb, run_stages

sys.path.append(str(Path(__file__).parents[1] / "tests"))

LENGTH, VOCAB, BATCH, STEPS = 256, 300, 16, 40
MODEL = {"hidden_size": 256, "num_layers": 4}
ROUNDS = 2
RESUMES = 3
PARTS, PART_ROWS = 8, 2_000


# order


def measure_order(_: Path) -> dict[str, float]:
    """Growth of a fresh process, over that of its imports."""
    found = {
        f"{rows:.0e} rows": in_fresh_process(__file__, "--way", "order", "--uri", str(rows))
        for rows in (10**6, 10**9)
    }
    memory = {f"{name}: MB": run["memory_mb"] for name, run in found.items()}
    return memory | {f"{name}: parts": run["parts"] for name, run in found.items()}


def way_order(options: argparse.Namespace) -> dict[str, Any]:
    """An order over parts of 62,500 sequences, and what it takes to walk a thousand steps."""
    from stillhouse.training.order import Rows, SampleOrder, default_window

    count = max(1, int(options.uri) // 62_500)
    before = memory_mb("VmRSS")
    rows = np.full(count, 62_500)
    order = SampleOrder(
        [Rows(rows)], global_batch=512, seed=0, lanes=64, window=default_window(64, 2048)
    )
    num_windows = sum(1 for _ in order.windows(range(64), 10**9 // 1024, 10**9 // 1024 + 1000))
    assert num_windows
    return {"memory_mb": memory_mb("VmHWM") - before, "parts": count}


# loop


def make_data(folder: Path, num_parts: int = PARTS, part_rows: int = PART_ROWS) -> dict[str, str]:
    """Random tokens in parts, and a tokenizer; where they lie."""
    from small import make_models

    if not (folder / "tokenizer").exists():
        make_models(folder)
    tokens = folder / "tokens"
    tokens.mkdir(exist_ok=True)
    for number in range(num_parts):
        path = tokens / f"{number}.parquet"
        if not path.exists():
            rng = np.random.default_rng(number)
            ids = rng.integers(5, VOCAB - 50, part_rows * LENGTH, dtype=np.uint16)
            column = pa.FixedSizeListArray.from_arrays(pa.array(ids), LENGTH)
            pq.write_table(pa.table({"input_ids": column}), path, row_group_size=500)
    return {"tokens": str(tokens), "tokenizer": str(folder / "tokenizer")}


def write_spec(folder: Path, store: str, num_steps: int, **train: Any) -> str:
    """A spec of one worker; its path."""
    places = make_data(folder)
    spec = {
        "job": "train",
        "store": store,
        "data": {"path": f"{places['tokens']}/*.parquet"},
        "tokenizer": {"path": places["tokenizer"]},
        "model": MODEL,
        "train": {
            "num_tokens": num_steps * BATCH * LENGTH,
            "global_batch": BATCH,
            "micro_batch": BATCH,
            "lanes": 4,
            "window": 500,
        }
        | train,
        "compute": {"trainers": 1},
    }
    path = folder / f"spec-{Path(store).name}.yaml"
    path.write_text(yaml.safe_dump(spec))
    return str(path)


def measure_loop(folder: Path) -> dict[str, Any]:
    """Both in turn; the first round warms the page cache and is not counted."""
    folder.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[dict[str, Any]]] = {"memory": [], "job": []}
    for _ in range(ROUNDS + 1):
        store = folder / "loop"
        shutil.rmtree(store, ignore_errors=True)
        spec = write_spec(folder, str(store), STEPS)
        runs["memory"].append(in_fresh_process(__file__, "--way", "memory", "--spec", spec))
        runs["job"].append(run_job(spec)["train"])
    orders = {run["order_sha256"] for both in runs.values() for run in both}
    losses = {run["final_loss"] for both in runs.values() for run in both}
    if len(orders) != 1 or len(losses) != 1:
        sys.exit(f"not the same training: {orders}, {losses}")
    rates = {name: [r["tokens_per_second"] for r in both[1:]] for name, both in runs.items()}
    ratios = [job / bare for bare, job in zip(rates["memory"], rates["job"], strict=True)]
    return {
        "from memory: tokens/s": statistics.median(rates["memory"]),
        "job: tokens/s": statistics.median(rates["job"]),
        "of the rate from memory": statistics.median(ratios),
        "ratios": ratios,
        "data wait, share": statistics.median(r["data_wait_share"] for r in runs["job"][1:]),
        "same samples and loss": True,
    }


def run_job(spec: str) -> dict[str, Any]:
    """`stillhouse run --json` in a process and a Ray of its own."""
    with tempfile.TemporaryDirectory(prefix="sh-") as ray_folder:
        environment = _environment(ray_folder)
        done = subprocess.run(_command(spec), check=True, stdout=subprocess.PIPE, env=environment)
    return json.loads(done.stdout)


def _command(spec: str) -> list[str]:
    return [str(Path(sys.executable).with_name("stillhouse")), "run", spec, "--json"]


def _environment(ray_folder: str) -> dict[str, str]:
    return os.environ | {"RAY_TMPDIR": ray_folder, "RAY_worker_niceness": "0"}


def way_memory(options: argparse.Namespace) -> dict[str, Any]:
    """The same trainer and samples; all batches are in memory before the first step."""
    import torch

    from stillhouse.models.causal_lm import build_model
    from stillhouse.spec import ModelSettings
    from stillhouse.text.tokenizer import load_tokenizer
    from stillhouse.training.fetch import PartReader, read_ahead
    from stillhouse.training.loop import Trainer
    from stillhouse.training.order import Rows, SampleOrder
    from stillhouse.training.spec import TrainSpec
    from stillhouse.training.stream import Batch, TokenStream

    torch.set_num_threads(1)
    spec = TrainSpec.model_validate(yaml.safe_load(Path(options.spec).read_text()))
    assert spec.tokenizer is not None
    uris = sorted(map(str, (Path(spec.tokenizer.path).parent / "tokens").glob("*.parquet")))
    settings = spec.train
    order = SampleOrder(
        [Rows([PART_ROWS] * len(uris))],
        global_batch=BATCH,
        seed=settings.seed,
        lanes=settings.lanes or 1,
        window=settings.window or 1,
    )
    stream = TokenStream(order, read_ahead(PartReader(uris), 500))
    held = iter([stream.next_batch() for _ in range(STEPS)])

    class InMemory:
        """Batches that are there already."""

        def next_batch(self) -> Batch:
            return next(held)

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise NotImplementedError

        def close(self) -> None:
            pass

    tokenizer = load_tokenizer(spec.tokenizer.path, None)
    model = build_model(
        ModelSettings(**MODEL),
        vocab_size=tokenizer.vocab_size,
        sequence_length=LENGTH,
        seed=settings.seed,
        eos_id=tokenizer.eos_id,
    )
    trainer = Trainer(
        model,
        InMemory(),
        settings,
        device=torch.device("cpu"),
        num_steps=STEPS,
        stop_on_explosion=True,
    )
    records = [trainer.step() for _ in range(STEPS)]
    return {
        "tokens_per_second": STEPS * BATCH * LENGTH / sum(r.seconds for r in records),
        "final_loss": records[-1].loss,
        "order_sha256": trainer.order_sha256,
    }


# resume


def measure_resume(folder: Path) -> dict[str, Any]:
    """Kill a run after its second checkpoint; the time its successors take until they train.

    Each round has its bare start of Ray before it; the first is not counted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    store = folder / "resume"
    shutil.rmtree(store, ignore_errors=True)
    spec = write_spec(folder, str(store), 10 * STEPS, checkpoint_every=5)
    with tempfile.TemporaryDirectory(prefix="sh-") as ray_folder:
        first = subprocess.Popen(
            _command(spec),
            stdout=subprocess.DEVNULL,
            env=_environment(ray_folder),
            start_new_session=True,
        )
        while len(list(store.glob("checkpoints/*/*/manifest.json"))) < 2:
            time.sleep(0.2)
        first.send_signal(signal.SIGKILL)
        first.wait()
    while subprocess.run(["ps", "-s", str(first.pid)], stdout=subprocess.DEVNULL).returncode == 0:
        time.sleep(1)  # its Ray goes by itself, the last of it after a minute
    bare: list[float] = []
    resumed: list[float] = []
    for _ in range(RESUMES + 1):
        bare.append(in_fresh_process(__file__, "--way", "ray", "--uri", str(time.time()))["s"])
        seconds, step = _resume(spec, store)
        resumed.append(seconds)
    beyond = [ours - theirs for ours, theirs in zip(resumed[1:], bare[1:], strict=True)]
    return {
        "went on after step": step,
        "until it trains: s": statistics.median(resumed[1:]),
        "Ray Train's start, to a worker that does nothing: s": statistics.median(bare[1:]),
        "beyond Ray's start: s": statistics.median(beyond),
        "each": beyond,
    }


def _resume(spec: str, store: Path) -> tuple[float, int]:
    """Seconds from the start of a process until its training goes on, and after which step."""
    from stillhouse.storage.artifact import Store
    from stillhouse.training.run import starts_of

    [checkpoints] = [path.name for path in (store / "checkpoints").iterdir()]
    before = len(starts_of(Store(str(store)), checkpoints))
    with tempfile.TemporaryDirectory(prefix="sh-") as ray_folder:
        began = time.time()
        process = subprocess.Popen(
            _command(spec), stdout=subprocess.DEVNULL, env=_environment(ray_folder)
        )
        while len(found := starts_of(Store(str(store)), checkpoints)) == before:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        process.wait()
    return found[-1]["time"] - began, found[-1]["step"]


def way_ray(options: argparse.Namespace) -> dict[str, Any]:
    """A process, Ray, and one worker of Ray Train that only says when it begins."""
    import ray
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    with tempfile.TemporaryDirectory(prefix="sh-") as folder:
        ray.init(_temp_dir=folder, include_dashboard=False, log_to_driver=False, logging_level=40)
        said = Path(folder) / "said"
        bare = TorchTrainer(
            lambda: said.write_text(str(time.time())), scaling_config=ScalingConfig(num_workers=1)
        )
        bare.fit()
        began = float(said.read_text())
        ray.shutdown()
    return {"s": began - float(options.uri)}


STAGES: Stages = {"order": measure_order, "loop": measure_loop, "resume": measure_resume}
WAYS: Ways = {"order": way_order, "memory": way_memory, "ray": way_ray}
LIMITS = {
    "order: 1e+09 rows: MB": 100.0,
    "loop: data wait, share": 0.02,
    "resume: beyond Ray's start: s": 5.0,
}
FLOORS = {"loop: of the rate from memory": 0.95}

if __name__ == "__main__":
    run_stages(STAGES, WAYS, LIMITS, FLOORS)
