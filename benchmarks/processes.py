"""Benchmarks in stages, each way measured in a process of its own."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

Stages: TypeAlias = dict[str, Callable[[Path], dict[str, Any]]]
Ways: TypeAlias = dict[str, Callable[[argparse.Namespace], dict[str, Any]]]


def memory_mb(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1000


_SMALL = "STILLHOUSE_BENCHMARK_SMALL"


def is_small() -> bool:
    """Whether `--small` was given, to this process or to the one that started it."""
    return "--small" in sys.argv or _SMALL in os.environ


def in_fresh_process(script: str, *arguments: str, **environment: str) -> dict[str, Any]:
    """Run a script that prints its result as JSON."""
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=os.environ | environment)
    return json.loads(done.stdout)


def run_stages(
    stages: Stages, ways: Ways, limits: dict[str, float], floors: dict[str, float]
) -> None:
    """The command line of a benchmark: its stages, each printed as it is done, and the verdict.

    `--way` runs one of `ways` instead, in a process that a stage started.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", type=Path, default=Path("bench_files"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--stage", default=",".join(stages))
    parser.add_argument("--small", action="store_true", help="sizes that find mistakes, no figures")
    for hidden in ("--way", "--uri", "--spec"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.small:
        os.environ[_SMALL] = "1"
    if options.way:
        print(json.dumps(ways[options.way](options)))
        return
    found: dict[str, dict[str, Any]] = {}
    for stage in options.stage.split(","):
        found[stage] = stages[stage](options.dir.resolve())
        print(json.dumps({stage: found[stage]}, indent=1), flush=True)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")
    flat = {f"{s}: {n}": v for s, figures in found.items() for n, v in figures.items()}
    above = [f"{n} {flat[n]:.3g} > {x:g}" for n, x in limits.items() if n in flat and flat[n] > x]
    below = [f"{n} {flat[n]:.3g} < {x:g}" for n, x in floors.items() if n in flat and flat[n] < x]
    print("missed: " + ("; ".join(above + below) or "none"))
