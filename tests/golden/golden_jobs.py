"""Small specs of all four jobs and what comes out of them, as plain numbers.

    python tests/golden/golden_jobs.py OUT.json     # runs them and writes the numbers

Every job runs with two workers, by the command line, and is read through the public readers, so
that the same file compares two versions of the code. What depends on training a prior or
conditional is left out: select is given both. Integers are exact; floats differ between CPUs.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

import stillhouse

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as pytest does

from mixing_world import write_data
from mixing_world import write_spec as write_mix_spec
from small import DIGITS, LEARNING, MODEL, MTT, make_models, make_world, small_spec

TWO = {"compute": {"scorers": 2, "trainers": 2, "packers": 1}}
STEPS, LENGTH, BATCH = 24, 32, 8
SELECT: dict[str, dict[str, Any]] = {
    "color": {},
    "shares": {"selection": {"tau": 8, "min_share": {"sea": 0.2}, "max_share": {"food": 0.4}}},
    "documents": {"selection": {"tau": 8, "grain": "documents"}},
}
DISTILL: dict[str, dict[str, Any]] = {
    "mtt": MTT,
    "rded": {
        "network": {"name": "convnet", "depth": 2, "width": 4, "norm": "batch"},
        "teachers": [{"name": "convnet", "depth": 2, "width": 4, "norm": "batch"}],
        "squeeze": {
            "optimiser": "sgd",
            "learning_rate": 0.1,
            "epochs": 2,
            "views": {"mix": "none"},
        },
        "method": {"name": "rded", "images_per_class": 3, "num_candidates": 10},
    },
}


def run(folder: Path, name: str, content: dict[str, Any]) -> dict[str, Any]:
    """What `stillhouse run --json` prints for a spec."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    command = [str(Path(sys.executable).parent / "stillhouse"), "run", str(path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: exit {done.returncode}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout)


def select(folder: Path) -> dict[str, Any]:
    """Kept rows, their scores and the threshold of several selections from one pool."""
    made = make_models(folder)
    found = {}
    for name, changes in SELECT.items():
        result = run(folder, f"select-{name}", small_spec(folder, **made, **TWO, **changes))
        rows = stillhouse.open_selection(result["run"]).to_arrow().read_all().to_pylist()
        found[name] = {
            "kept": [_places(row) for row in rows],
            "scores": [row["score"] for row in rows],
            "threshold": result["selection"]["threshold"],
            "sources": result["selection"]["sources"],
            "fates": result["selection"]["fates"],
        }
    return found


def train(folder: Path) -> dict[str, Any]:
    """Order and losses of a training on a selection, offline and with batches chosen online."""
    models = make_models(folder)
    kept = run(folder, "select-for-train", small_spec(folder, **models, **TWO))
    spec = {
        "job": "train",
        "store": str(folder / "store"),
        "data": {"selection": kept["selection_fingerprint"]},
        "model": MODEL,
        "heldout": {"path": str(folder / "target" / "*.parquet")},
        "train": {"num_tokens": STEPS * BATCH * LENGTH, "dtype": "float32", **LEARNING},
        "compute": {"trainers": 2, "packers": 1, "scorers": 2},
    }
    online = {name: models[name] for name in ("prior", "conditional")} | {"tau": 2}
    changes = {
        "offline": {},
        "online": {"online": online, "train": spec["train"] | {"select": "online"}},
    }
    return {name: _trained(folder, name, spec | change) for name, change in changes.items()}


def mix(folder: Path) -> dict[str, Any]:
    """Draws, rewards and losses of each policy."""
    data = write_data(folder)
    found = {}
    for name in ("ucb1", "exp3"):
        policy = {"name": name, "reward": "aggregate", "initial_examples": 8}
        changes = {"policy": policy, "controls": ["uniform"], "compute": {"trainers": 2}}
        spec = yaml.safe_load(Path(write_mix_spec(data, name, **changes)).read_text())
        result = run(folder, f"mix-{name}", spec)
        for label, of in result["artifacts"]["decisions"].items():
            parts = [pq.read_table(p) for p in sorted(Path(of["0"]).glob("*.parquet"))]
            rows = [row for part in parts for row in part.to_pylist()]
            found[f"{name}: {label}"] = {
                "arms": [row["arm"] for row in rows],
                "rewards": [row["reward"] for row in rows],
                "heldout_nll": result["mix"][label]["seeds"]["0"]["heldout_nll"],
            }
    return found


def distill(folder: Path) -> dict[str, Any]:
    """Pixels (of 8 bits), labels and test accuracies of distilled digits."""
    found = {}
    for name, changes in DISTILL.items():
        spec = DIGITS | changes | {"controls": ["random_real"], "compute": {"distillers": 2}}
        spec |= {"store": str(folder / "store")}
        result = run(folder, f"distill-{name}", spec)
        small = stillhouse.open_distilled(result["run"])
        found[name] = {
            "pixels": small.images.reshape(len(small.images), -1).astype(float).round(4).tolist(),
            "labels": small.labels.tolist(),
            "bytes": result["distill"]["bytes"],
            "controls": result["distill"]["controls"]["random_real"]["test_accuracy"],
        }
    return found


JOBS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "select": select,
    "train": train,
    "mix": mix,
    "distill": distill,
}


def run_all(folder: Path) -> dict[str, Any]:
    """The numbers of all jobs, each in its own folder."""
    found = {}
    for name, job in JOBS.items():
        (folder / name).mkdir(parents=True)
        if name in ("select", "train"):
            make_world(folder / name, shards=2)
        found[name] = job(folder / name)
    return found


def _places(row: dict[str, Any]) -> Any:
    """Where a kept row lies: of a sequence its pieces of documents, of a document its id."""
    if "documents" in row:
        return [[piece["id"], piece["start"], piece["end"]] for piece in row["documents"]]
    return row["id"]


def _trained(folder: Path, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    found = run(folder, f"train-{name}", spec)["train"]
    keys = ("order_sha256", "num_steps", "num_tokens", "heldout_nll", "final_loss")
    return {key: found[key] for key in keys}


def main() -> None:
    """Write the numbers to the file that the command line names."""
    import ray

    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    with tempfile.TemporaryDirectory() as folder:
        found = run_all(Path(folder))
    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
