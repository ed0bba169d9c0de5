"""What a teacher's stored signals cost: making them, and reading them while a student trains.

    python benchmarks/signals.py --dir FOLDER --json OUT [--stage pass,wait] [--small]

FOLDER is on local disk, and is kept. Stages:

* pass: tokens a second of a teacher's pass in `job: train`, from its first finished part on, over
  those of the scoring kernel alone on the same parts, in turn. Both have to make the same bits.
* wait: the share of a training's time that it waits for data, without signals, with stored ones and
  with live ones, in turn. Samples have to be the same; live signals have to give the losses of
  stored ones, and where the teacher has no weight losses have to be those of a training without.
"""

import argparse
import hashlib
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml
from numpy.typing import NDArray
from processes import Stages, Ways, in_fresh_process, is_small, run_stages
from training import BATCH, LENGTH, make_data, run_job

SMALL = is_small()
PARTS, PART_ROWS = (3, 40) if SMALL else (8, 400)
TEACHER = {"hidden_size": 32 if SMALL else 256, "num_layers": 1 if SMALL else 4}
STUDENT = {"hidden_size": 32 if SMALL else 256, "num_layers": 1 if SMALL else 4}
STEPS, ROUNDS = (4, 1) if SMALL else (60, 3)
TOP_K = 32


def make_teacher(folder: Path, tokenizer: str) -> str:
    """A model of random weights; its folder."""
    import torch

    from stillhouse.models.causal_lm import build_model, save_model
    from stillhouse.spec import ModelSettings
    from stillhouse.text.tokenizer import load_tokenizer

    torch.manual_seed(0)
    words = load_tokenizer(tokenizer, None)
    model = build_model(
        ModelSettings(**TEACHER),
        vocab_size=words.vocab_size,
        sequence_length=LENGTH,
        seed=7,
        eos_id=words.eos_id,
    )
    save_model(model, folder / "teacher")
    return str(folder / "teacher")


def write_spec(folder: Path, store: str, steps: int, seed: int = 0, **objective: Any) -> str:
    """A spec of one worker and one teacher's worker; its path."""
    places = make_data(folder, PARTS, PART_ROWS)
    if objective:
        teachers = [{"path": make_teacher(folder, places["tokenizer"])}]
        objective |= {"name": "distil", "teachers": teachers, "top_k": TOP_K}
    spec = {
        "job": "train",
        "store": store,
        "data": {"path": f"{places['tokens']}/*.parquet"},
        "tokenizer": {"path": places["tokenizer"]},
        "model": STUDENT,
        "train": {
            "num_tokens": steps * BATCH * LENGTH,
            "global_batch": BATCH,
            "micro_batch": BATCH,
            "lanes": 4,
            "seed": seed,
            **({"objective": objective} if objective else {}),
        },
        "compute": {"trainers": 1, "scorers": 1},
    }
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(spec))
    return str(path)


def measure_pass(folder: Path) -> dict[str, Any]:
    """The job and the kernel in turn; the kernel's first part warms it."""
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, Any]]] = {"kernel": [], "job": []}
    for _ in range(ROUNDS):
        store = folder / "pass"
        shutil.rmtree(store, ignore_errors=True)
        spec = write_spec(folder, str(store), 1, weight=0.5)
        for way in found:
            found[way].append(in_fresh_process(__file__, "--way", way, "--spec", spec))
    digests = {tuple(run["digests"]) for runs in found.values() for run in runs}
    if len(digests) != 1:
        sys.exit("the job's signals are not the kernel's")
    rates = {way: [run["tokens_per_second"] for run in runs] for way, runs in found.items()}
    ratios = [job / bare for job, bare in zip(rates["job"], rates["kernel"], strict=True)]
    return {
        "kernel: tokens/s": statistics.median(rates["kernel"]),
        "job: tokens/s": statistics.median(rates["job"]),
        "of the kernel's rate": statistics.median(ratios),
        "ratios": ratios,
        "same signals": True,
    }


def digest(columns: Sequence[NDArray[Any]]) -> str:
    """SHA-256 of a part's ids, log-probabilities and tails."""
    return hashlib.sha256(b"".join(np.ascontiguousarray(c).tobytes() for c in columns)).hexdigest()


@dataclass(slots=True)
class Clock:
    """A listener that notes when each part of the teacher's pass is finished."""

    step: str
    running: bool = False
    times: list[float] = field(default_factory=list)
    amounts: list[float] = field(default_factory=list)

    def begin(self, step: str, total: int, reused: int, unit: str) -> None:
        """Listen if it is this step."""
        self.running = step == self.step

    def advance(self, step: str, done: float, amount: float) -> None:
        """A part is finished."""
        if self.running:
            self.times.append(perf_counter())
            self.amounts.append(amount)

    def end(self, step: str, seconds: float) -> None:
        """Nothing to note."""

    def note(self, kind: str, content: dict[str, Any]) -> None:
        """Nothing to note."""


def way_job(options: argparse.Namespace) -> dict[str, Any]:
    """The teacher's pass as a job does it; the rate is from the first finished part to the last."""
    from stillhouse.jobs.run import run_job as run
    from stillhouse.pipelines.teachers import SIGNALS
    from stillhouse.training.signals import COLUMNS
    from stillhouse.training.spec import TrainSpec

    spec = TrainSpec.model_validate(yaml.safe_load(Path(options.spec).read_text()))
    clock = Clock(SIGNALS)
    run(spec, clock)
    parts = [pq.read_table(path) for path in Path(spec.store, "signals", "parts").iterdir()]
    arrays = [
        [part[name].combine_chunks().flatten().to_numpy() for name in COLUMNS] for part in parts
    ]
    return {
        "tokens_per_second": sum(clock.amounts[1:]) / (clock.times[-1] - clock.times[0]),
        "digests": sorted(map(digest, arrays)),
    }


def way_kernel(options: argparse.Namespace) -> dict[str, Any]:
    """The same parts by the kernel and its reduction alone."""
    from stillhouse.models.scoring import load_scoring_model
    from stillhouse.models.token_samples import top_tokens
    from stillhouse.spec import ScoringSettings
    from stillhouse.text.pieces import token_ids
    from stillhouse.text.tokenizer import load_tokenizer
    from stillhouse.training.spec import TrainSpec

    spec = TrainSpec.model_validate(yaml.safe_load(Path(options.spec).read_text()))
    assert spec.tokenizer is not None
    vocab_size = load_tokenizer(str(spec.tokenizer.path), None).vocab_size
    model = load_scoring_model(
        str(spec.train.objective.teachers[0].path),
        ScoringSettings(dtype=spec.train.dtype),
        device="cpu",
        gpus=0,
        threads=1,
    )
    uris = sorted((Path(spec.tokenizer.path).parent / "tokens").glob("*.parquet"))
    parts = [token_ids(pq.read_table(uri, columns=["input_ids"])) for uri in uris]

    def made(ids: NDArray[Any]) -> list[NDArray[Any]]:
        def reduce(logits: Any, _: Any) -> Any:
            return top_tokens(logits[:, :vocab_size], TOP_K, [1.0])

        return model.map_logits(ids, reduce)

    done = [made(parts[0])]
    started = perf_counter()
    done += [made(ids) for ids in parts[1:]]
    seconds = perf_counter() - started
    return {
        "tokens_per_second": sum(ids.size for ids in parts[1:]) / seconds,
        "digests": sorted(map(digest, done)),
    }


def measure_wait(folder: Path) -> dict[str, Any]:
    """Trainings in turn, of the same samples; signals are made before."""
    folder.mkdir(parents=True, exist_ok=True)
    store, apart = folder / "wait", folder / "wait-live"  # a stored training is a live one's too
    for place in (store, apart):
        shutil.rmtree(place, ignore_errors=True)
    kinds: dict[str, dict[str, Any]] = {
        "without": {},
        "stored": {"weight": 0.5},
        "live": {"weight": 0.5, "signals": "live"},
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in kinds}
    run_job(write_spec(folder, str(store), 1, seed=100, weight=0.5))
    for seed in range(ROUNDS):
        for name, objective in kinds.items():
            place = str(apart if name == "live" else store)
            spec = write_spec(folder, place, STEPS, seed, **objective)
            runs[name].append(run_job(spec)["train"])
    same = run_job(write_spec(folder, str(store), STEPS, 0, weight=0.0))["train"]
    first = {name: done[0] for name, done in runs.items()}
    orders = {run["order_sha256"] for run in (same, *first.values())}
    gaps = (
        abs(same["final_loss"] - first["without"]["final_loss"]),
        abs(first["live"]["final_loss"] - first["stored"]["final_loss"]),
    )
    if len(orders) != 1 or max(gaps) > 1e-3:
        sys.exit(f"not the same training: {orders}, losses differ by {gaps}")
    waits = {name: [run["data_wait_share"] for run in done] for name, done in runs.items()}
    rates = {name: [run["tokens_per_second"] for run in done] for name, done in runs.items()}
    over = {
        name: [a / b for a, b in zip(rates[name], rates["without"], strict=True)]
        for name in ("stored", "live")
    }
    shares = {f"data wait, {name}: share": statistics.median(each) for name, each in waits.items()}
    ratios = {f"{name}: rate over that without": statistics.median(x) for name, x in over.items()}
    return shares | ratios | {"each": waits, "same samples and losses": True}


STAGES: Stages = {"pass": measure_pass, "wait": measure_wait}
WAYS: Ways = {"job": way_job, "kernel": way_kernel}
LIMITS = {"wait: data wait, stored: share": 0.02}
FLOORS = {"pass: of the kernel's rate": 0.9}

if __name__ == "__main__":
    run_stages(STAGES, WAYS, LIMITS, FLOORS)
