"""What a GPU does with the product, for a machine that is lent for minutes.

    python benchmarks/gpu.py --stage jobs --out FOLDER                    (five minutes on one GPU)
    python benchmarks/gpu.py --stage jobs --out FOLDER --device cpu --small

`jobs`: the four jobs, and online selection, each from its spec by the installed command, with data
made up here. Each has a deadline; one that fails or is too slow is a row, not the end. A JSON line
a job is in FOLDER/jobs.jsonl as soon as it ended, beside its log; a table is printed at the end.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from stillhouse.storage.artifact import load_manifest
from stillhouse.storage.layout import has_manifest

_BUDGET_S = 300
_SHARES = {"select": 0.4, "train": 0.15, "online": 0.15, "mix": 0.15, "distill": 0.15}
"""Of the budget: the deadlines."""
_GRACE_S = 5
_WORDS = 20_000
_CLASSES = ("ring", "other", "noise")


@dataclass(frozen=True)
class Size:
    """How large the jobs are."""

    pool_tokens: int
    length: int
    hidden: int
    layers: int
    vocab: int
    steps: int
    """Of mixing and of distillation."""


GPU = Size(12_000_000, 512, 512, 8, 16_384, 100)
SMALL = Size(200_000, 64, 32, 1, 512, 6)


def main() -> None:
    """Run the stage."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--stage", choices=["jobs"], required=True)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu-out")))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes for a try without a GPU")
    parser.add_argument("--budget", type=float, default=_BUDGET_S, help="seconds for all jobs")
    parser.add_argument("--only", nargs="*", choices=list(_SHARES), help="some of the jobs")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    size = SMALL if options.small else GPU
    with tempfile.TemporaryDirectory(prefix="sh-gpu-") as folder:
        rows = run_jobs(Path(folder), options, size)
    print(table(rows))
    sys.exit(any(row["status"] != "done" for row in rows))


def run_jobs(folder: Path, options: argparse.Namespace, size: Size) -> list[dict[str, Any]]:
    """One job after another; the later ones read what the first selected."""
    rng = np.random.default_rng(0)
    write_text(folder, rng, size)
    write_tasks(folder, rng)
    gpus = 1.0 if options.device == "cuda" else 0.0
    specs: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "select": lambda _: select_spec(folder, size),
        "train": lambda found: train_spec(folder, size, found),
        "online": lambda found: online_spec(folder, size, found),
        "mix": lambda _: mix_spec(folder, size),
        "distill": lambda _: distill_spec(folder, size),
    }
    rows: list[dict[str, Any]] = []
    selected: dict[str, Any] = {}
    for name in options.only or specs:
        if name in {"train", "online"} and not selected:
            rows.append({"job": name, "status": "no selection", "seconds": 0.0})
            continue
        compute = {"device": options.device, "gpus_per_worker": gpus, "scorers": 1}
        if name == "online" and gpus:
            compute |= {"gpus_per_worker": 0.5}  # scorer and trainer share the GPU
        spec = specs[name](selected) | {"compute": compute}
        row, result = run_job(name, spec, options.out, options.budget * _SHARES[name])
        selected = result if name == "select" else selected
        rows.append(row)
        with open(options.out / "jobs.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
    return rows


def run_job(
    name: str, spec: dict[str, Any], out: Path, deadline_s: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The row of a job, and its result where it has one."""
    path = out / f"{name}.yaml"
    path.write_text(yaml.safe_dump(spec, sort_keys=False))
    command = [str(Path(sys.executable).with_name("stillhouse")), "run", str(path), "--json"]
    started = perf_counter()
    log = out / f"{name}.log"
    with (
        open(log, "wb") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
        ) as process,
    ):
        try:
            said, _ = process.communicate(timeout=deadline_s)
            status = "done" if process.returncode == 0 else f"exit {process.returncode}"
        except subprocess.TimeoutExpired:
            said, status = _end(process), "too slow"
    seconds = round(perf_counter() - started, 1)
    row = {"job": name, "status": status, "seconds": seconds, "deadline_s": round(deadline_s)}
    try:
        result = json.loads(said)
    except ValueError:
        result = {}
    if status != "done":
        reason = result.get("error") or log.read_text(errors="replace")[-300:]
        return row | {"error": " ".join(str(reason).split())[:300]}, {}
    return row | figures(result), result


def _end(process: "subprocess.Popen[bytes]") -> bytes:
    """What a job printed that has to end: asked first, then killed with all that it started."""
    process.send_signal(signal.SIGTERM)
    try:
        return process.communicate(timeout=_GRACE_S)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()[0]


def figures(result: dict[str, Any]) -> dict[str, Any]:
    """The seconds of a job's steps, where it was computed, and what it achieved."""
    steps = {step: round(work["seconds"], 1) for step, work in result["work"].items()}
    found = {"steps": steps, "devices": sorted(devices(result["artifacts"]))}
    if "train" in result and "tokens_per_second" in result["train"]:
        kept = ("tokens_per_second", "mfu", "data_wait_share")
        found |= {name: result["train"][name] for name in kept}
    return found


def devices(artifacts: Any) -> set[str]:
    """What the manifests of a result's artifacts say that made them."""
    if isinstance(artifacts, dict):
        return set().union(*map(devices, artifacts.values()))
    folder = str(artifacts)
    made_by = load_manifest(folder).made_by if has_manifest(folder) else {}
    return {made_by["device"]} if "device" in made_by else set()


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, the longest steps of each job first."""
    lines = ["| job | status | s | device | longest steps, s |", "|---|---|---|---|---|"]
    for row in rows:
        steps = sorted(row.get("steps", {}).items(), key=lambda item: -item[1])[:4]
        longest = ", ".join(f"{step} {seconds:g}" for step, seconds in steps)
        where = ", ".join(row.get("devices", []))
        said = longest or row.get("error", "")
        lines.append(f"| {row['job']} | {row['status']} | {row['seconds']} | {where} | {said} |")
    return "\n".join(lines)


def write_text(folder: Path, rng: np.random.Generator, size: Size) -> None:
    """A pool of made-up words by Zipf's law, and a target that prefers some of them."""
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = np.array(["".join(letters[rng.integers(0, 26, 3 + i % 7)]) for i in range(_WORDS)])
    weights = 1 / np.arange(1, _WORDS + 1)
    others = np.roll(weights, _WORDS // 3)
    for name, share, chances in (("pool", 1.0, weights), ("target", 0.05, weights + others)):
        count = max(64, int(share * size.pool_tokens / 600))  # about 400 words of 1.5 tokens each
        drawn = rng.choice(words, (count, 400), p=chances / chances.sum())
        texts = [" ".join(row) for row in drawn]
        ids = [f"{name}{i}" for i in range(count)]
        pq.write_table(pa.table({"id": ids, "text": texts}), folder / f"{name}.parquet")


def write_tasks(folder: Path, rng: np.random.Generator) -> None:
    """A task to learn (the next word in a ring), and arms of which one does the same."""
    words = [f"word{i}" for i in range(12)]
    rows: list[dict[str, Any]] = []
    for kind in _CLASSES:
        for first, second in rng.integers(0, 12, (400, 2)).tolist():
            answer = {"ring": (first + 1) % 12, "other": second, "noise": 0}[kind]
            text = f"{words[first]} then {words[second]}"
            rows.append({"input": text, "target": words[answer], "task": kind})
    pq.write_table(pa.Table.from_pylist(rows), folder / "arms.parquet")
    choices = [words[i] for i in (0, 1, 2)]
    shots = [
        row | {"choices": sorted({row["target"], *choices}), "split": split}
        for row, split in zip(rows[:200], ["train", "test"] * 100, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(shots), folder / "shots.parquet")


def select_spec(folder: Path, size: Size) -> dict[str, Any]:
    """Prior and conditional trained here, all of the pool scored twice."""
    return {
        "job": "select",
        "store": str(folder / "store"),
        "pool": {"path": str(folder / "pool.parquet")},
        "target": {"path": str(folder / "target.parquet"), "heldout": 0.2},
        "tokenizer": {"train": {"vocab_size": size.vocab}},
        "sequence_length": size.length,
        "part_tokens": size.pool_tokens // 6,
        "prior": {"model": _model(size), "num_tokens": size.pool_tokens // 10, "global_batch": 32},
        "conditional": {"epochs": 1, "global_batch": 32},
        "selection": {"tau": 8},
    }


def train_spec(folder: Path, size: Size, selected: dict[str, Any]) -> dict[str, Any]:
    """A target on what was selected."""
    return {
        "job": "train",
        "store": str(folder / "store"),
        "data": {"selection": selected["artifacts"]["selection"]},
        "model": _model(size),
        "train": {"global_batch": 32, "eval_points": 2},
    }


def online_spec(folder: Path, size: Size, selected: dict[str, Any]) -> dict[str, Any]:
    """The same with batches that are chosen while it trains."""
    spec = train_spec(folder, size, selected)
    models = {name: {"path": selected["artifacts"][name]} for name in ("prior", "conditional")}
    return spec | {
        "train": spec["train"] | {"select": "online"},
        "online": models | {"tau": 4},
    }


def mix_spec(folder: Path, size: Size) -> dict[str, Any]:
    """A bandit over three arms."""
    return {
        "job": "mix",
        "store": str(folder / "store"),
        "target": {"path": str(folder / "shots.parquet"), "num_shots": 32},
        "auxiliary": {"path": str(folder / "arms.parquet"), "by": "task"},
        "tokenizer": {"train": {"vocab_size": 300}},
        "model": {"kind": "encoder_decoder", "hidden_size": size.hidden, "num_layers": size.layers},
        "policy": {"name": "ucb1", "reward": "alignment", "initial_examples": 32},
        "max_input_tokens": 48,
        "max_target_tokens": 16,
        "train": {
            "num_steps": size.steps,
            "micro_batch": 8,
            "accumulation": 4,
            "optimizer": "adamw",
            "learning_rate": 1e-3,
            "evaluate_every": max(1, size.steps // 2),
            "patience": None,
        },
    }


def distill_spec(folder: Path, size: Size) -> dict[str, Any]:
    """Trajectory matching on the digits."""
    return {
        "job": "distill",
        "store": str(folder / "store"),
        "data": {"dataset": "digits"},
        "network": {"name": "convnet", "depth": 2, "width": 16},
        "preprocessing": {"augmentation": ["crop", "scale", "rotate"]},
        "experts": {"count": 2, "epochs": 6, "batch_size": 128},
        "method": {
            "name": "mtt",
            "images_per_class": 1,
            "num_iterations": size.steps,
            "num_steps": 5,
            "max_start_epoch": 3,
            "evaluate_every": max(1, size.steps // 2),
        },
        "evaluate": {"seeds": 2, "epochs": 20},
    }


def _model(size: Size) -> dict[str, Any]:
    return {"hidden_size": size.hidden, "num_layers": size.layers}


if __name__ == "__main__":
    main()
