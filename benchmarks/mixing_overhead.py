"""What the bandit costs: step time against static mixing, memory of many arms, waiting for S3.

    python benchmarks/mixing_overhead.py --json OUT

Three figures, each side by side in one run: seconds a step of UCB1 and of static mixing with the
same gradient passes, steps of both in turn; resident memory after the same steps over 300
arms and over 3; the share of the step that waited for rows of 300 arms on a local S3 server.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from mixing_runs import World, make_world, task_of, write_json

from stillhouse.jobs.cluster import ALLOCATOR
from stillhouse.mixing.flad import Ucb1
from stillhouse.mixing.mixer import Mixer
from stillhouse.mixing.policy import Policy, StepPlan
from stillhouse.mixing.spec import MixModel, MixTraining, Rule
from stillhouse.mixing.static import Static
from stillhouse.mixing.trainer import MixTrainer
from stillhouse.storage.artifact import Store

LENGTHS = (64, 16)
SLOTS, BATCH, SHOTS, ROWS = 8, 8, 32, 400
MODEL = MixModel(hidden_size=128, num_layers=2)
TRAIN = MixTraining(learning_rate=1e-4, micro_batch=BATCH, warmup=0.05, optimizer="adamw")
CPU = torch.device("cpu")


def world(folder: Path, num_arms: int) -> World:
    """Arms of `ROWS` rows of random words."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=5)) for _ in range(500)]

    def rows(count: int) -> list[dict[str, Any]]:
        return [
            {"input": " ".join(rng.choices(words, k=16)), "target": rng.choice(words)}
            for _ in range(count)
        ]

    target = [r | {"split": "train"} for r in rows(64)] + [r | {"split": "test"} for r in rows(8)]
    arms = {f"arm{i:03}": rows(ROWS) for i in range(num_arms)}
    return make_world(folder, arms, target, vocab_size=4096, lengths=LENGTHS)


class Run:
    """A trainer and its mixer, a step at a time."""

    def __init__(self, made: World, policy: Policy, plan: StepPlan, root: str) -> None:
        rule = Rule(policy.label, policy, plan, SLOTS, 10_000)
        options: dict[str, Any] = {"seed": 0, "train": TRAIN, "model": MODEL, "num_shots": SHOTS}
        task = task_of(made, rule, log_every=10, **options)
        mixer = Mixer(task)
        self.trainer = MixTrainer(Store(root), task, mixer, device=CPU)
        mixer.begin(np.random.default_rng(0).uniform(0.1, 0.3, len(made.arms)).tolist())

    def step(self) -> tuple[float, float]:
        """Seconds of a step, and how many of them waited for data."""
        record = self.trainer.step()
        return record.seconds, record.data_wait_s


def bandit(target: int = 2) -> tuple[Policy, StepPlan]:
    """UCB1 with the target pass."""
    return Ucb1(name="ucb1"), StepPlan(target, "aggregate")


def step_times(made: World, steps: int) -> dict[str, Any]:
    """Of UCB1 and of static mixing with as many passes, a step of each in turn."""
    static = Static(name="static", size_temperature=0.0, target_pass=True)
    runs = {
        "ucb1": Run(made, *bandit(), made.store.uri),
        "static": Run(made, static, StepPlan(2), made.store.uri),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(steps):
        for name, run in runs.items():
            took = run.step()[0]
            if number >= 5:
                seconds[name].append(took)
    middle = {name: median(times) for name, times in seconds.items()}
    return middle | {"overhead": middle["ucb1"] / middle["static"] - 1}


def resident_mb() -> float:
    """Of this process now; its peak would be that of the process which started it."""
    status = Path("/proc/self/status").read_text()
    return float(status.split("VmRSS:")[1].split()[0]) / 1024


def memory(folder: str, num_arms: int) -> float:
    """Resident MB of a fresh process after the steps over the first `num_arms` arms."""
    command = [sys.executable, __file__, "--json", "-", "--folder", folder, "--only", str(num_arms)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def waits(made: World, steps: int) -> dict[str, float]:
    """Share of the time that waited for rows on a local S3 server."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    os.environ |= {"AWS_DEFAULT_REGION": "us-east-1"}
    os.environ["AWS_ENDPOINT_URL"] = f"http://{host}:{port}"
    files = s3fs.S3FileSystem()
    files.mkdir("arms")
    for path in [made.target, *(part.path for part in made.arms)]:
        files.put(made.store.path(path), f"arms/{path}")
    run = Run(made, *bandit(), "s3://arms")
    took = [run.step() for _ in range(steps)]
    server.stop()
    late = took[steps // 2 :]
    return {
        "all": sum(w for _, w in took) / sum(s for s, _ in took),
        "second_half": sum(w for _, w in late) / sum(s for s, _ in late),
        "opened": len(run.trainer.arms.opened),
    }


def main() -> int:
    """Measure; 1 where a limit is passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", required=True)
    parser.add_argument("--folder")
    parser.add_argument("--only", type=int)
    parser.add_argument("--steps", type=int, default=40)
    given = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(given.folder or tempfile.mkdtemp())
    made = world(folder, 300)
    if given.only:
        few = replace(made, arms=made.arms[: given.only])
        run = Run(few, *bandit(), made.store.uri)
        for _ in range(given.steps):
            run.step()
        print(resident_mb())
        return 0
    print("arms prepared", flush=True)
    found: dict[str, Any] = {"step": step_times(made, given.steps)}
    print(found, flush=True)
    found["memory_mb"] = {str(n): memory(str(folder), n) for n in (3, 300)}
    found["s3_wait"] = waits(made, given.steps)
    grown = found["memory_mb"]["300"] - found["memory_mb"]["3"]
    limits = {
        "overhead_at_most_5_percent": found["step"]["overhead"] <= 0.05,
        "memory_at_most_300_mb": grown <= 300,
        "wait_at_most_2_percent": found["s3_wait"]["all"] <= 0.02,
    }
    write_json(Path(given.json), found | {"limits": limits})
    print(json.dumps(found | {"limits": limits}, indent=1))
    return 0 if all(limits.values()) else 1


if __name__ == "__main__":
    if not {*ALLOCATOR} <= {*os.environ}:  # as every job's workers have it
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ALLOCATOR)
    raise SystemExit(main())
