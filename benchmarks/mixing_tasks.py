"""Policies and controls on real few-shot targets with 86 auxiliary tasks.

    python benchmarks/mixing_tasks.py --data ../shared/data --work FOLDER --json OUT

A small T5 is first trained on text of the pool (prefix language modelling), then for each target
and seed under every policy and control, all with the same number of gradient passes. Runs are kept
in FOLDER: with `--seconds` a call works for so long, and the next one goes on.
"""

from pathlib import Path
from statistics import fmean, stdev
from time import perf_counter
from typing import Any

import pyarrow.parquet as pq
import torch
from mixing_runs import World, make_world, options, run_one, task_of, write_json
from released_samplers import ReleasedExp3, ReleasedUcb1

from stillhouse.mixing.flad import Exp3, Ucb1
from stillhouse.mixing.policy import Policy, StepPlan
from stillhouse.mixing.spec import MixModel, MixTraining, Rule, control_policy
from stillhouse.mixing.static import Uniform

TARGETS = ("copa", "snli", "boolq")
LENGTHS = (96, 24)
SLOTS, BATCH, SHOTS = 8, 8, 32
MODEL = MixModel(hidden_size=64, num_layers=2)
TRAIN = MixTraining(
    learning_rate=5e-4, micro_batch=BATCH, warmup=0.05, optimizer="adamw", patience=None
)
KEYS = ("input", "target", "choices")


def rows_of(data: Path, target: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Arms by task, and the target's rows with at most 200 of its test split."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for row in pq.read_table(data / "tasks/auxiliary.parquet").to_pylist():
        if row["split"] == "train":
            arms.setdefault(row["task"], []).append({k: row[k] for k in KEYS})
    table = pq.read_table(data / "tasks/targets.parquet").to_pylist()
    mine = [
        {k: row[k] for k in KEYS} | {"split": row["split"]}
        for row in table
        if row["task"] == target
    ]
    test = [row for row in mine if row["split"] == "test"][:200]
    return arms, [row for row in mine if row["split"] != "test"] + test


def pretrained(work: Path, data: Path, steps: int) -> tuple[Path, str]:
    """A tokenizer, and a model that was trained on the pool's text, one arm a source."""
    texts: dict[str, list[dict[str, Any]]] = {}
    for file in sorted((data / "pool").glob("*.parquet")):
        table = pq.read_table(file, columns=["text", "source"])
        for text, source in zip(
            table["text"].to_pylist(), table["source"].to_pylist(), strict=True
        ):
            if len(texts.setdefault(source, [])) < 200:
                texts[source].append({"text": text[:1500]})
    any_row = {"input": "a b", "target": "c", "choices": None}
    target = [any_row | {"split": split} for split in ("train", "train", "test")]
    pool = make_world(work / "pool", texts, target, vocab_size=4096, lengths=LENGTHS)
    rule = Rule("pool", Uniform(name="uniform"), StepPlan(0), SLOTS, steps)
    train = TRAIN.model_copy(update={"learning_rate": 2e-3, "evaluate_every": steps})
    task = task_of(pool, rule, seed=0, train=train, model=MODEL, num_shots=2)
    made = run_one(pool, task)
    return Path(pool.tokenizer), pool.store.path("models", made.fingerprint)


def policies() -> dict[str, Policy]:
    """Both bandits with both samplers, and the controls of a mix job."""
    given: dict[str, Policy] = {
        "ucb1 faithful": Ucb1(name="ucb1", initial_examples=16),
        "ucb1 released": ReleasedUcb1(
            name="ucb1", initial_examples=16, target_batches=SHOTS // 2 // BATCH
        ),
        "exp3 faithful": Exp3(name="exp3", initial_examples=16),
        "exp3 released": ReleasedExp3(name="exp3", initial_examples=16),
    }
    first = given["ucb1 faithful"]
    for control in (
        "target_only",
        "uniform",
        "uniform_with_target_pass",
        "static_alignment",
        "loss_scaling",
    ):
        given[control] = control_policy(control, first)
    return given


def run(
    world: World, label: str, policy: Policy, seed: int, init: str, budget: int
) -> dict[str, Any]:
    """One run of `budget` gradient passes, the initial one included."""
    batches = SHOTS // 2 // BATCH
    each = SLOTS + batches
    plan = policy.plan(batches)
    slots = each - plan.passes(0)
    if label == "target_only":
        plan, slots = StepPlan(each), 0
    initial = sum(-(-min(16, p.num_rows) // BATCH) for p in world.arms) + batches
    steps = (budget - (initial if policy.first_examples else 0)) // each
    train = TRAIN.model_copy(update={"evaluate_every": max(1, steps // 5)})
    task = task_of(
        world,
        Rule(label, policy, plan, slots, steps),
        seed=seed,
        train=train,
        model=MODEL,
        num_shots=SHOTS,
        init=init,
        log_every=10,
    )
    made = run_one(world, task)
    test = made.totals["test"]
    return {
        "heldout_nll": test["nll"],
        "accuracy": test["accuracy"],
        "passes": made.totals["gradient_passes"],
        "seconds": made.totals["seconds"],
    }


def main() -> int:
    """Run what is missing and write the table."""
    parser = options(__doc__, seeds=3)
    parser.add_argument("--budget", type=int, default=3000, help="gradient passes of a run")
    parser.add_argument("--pool-steps", type=int, default=400)
    parser.add_argument("--only", nargs="*", help="these policies and controls")
    given = parser.parse_args()
    torch.set_num_threads(1)
    started = perf_counter()
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    tokenizer, init = pretrained(given.work, given.data, given.pool_steps)
    for seed in range(given.seeds):
        for target in TARGETS:
            arms, rows = rows_of(given.data, target)
            folder = given.work / target
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / tokenizer.name).exists():
                (folder / tokenizer.name).symlink_to(tokenizer.absolute())
            world = make_world(folder, arms, rows, vocab_size=4096, lengths=LENGTHS)
            for label, settings in policies().items():
                if given.only and label not in given.only:
                    continue
                if perf_counter() - started > given.seconds:
                    print("not finished: call it again")
                    return 3
                row = run(world, label, settings, seed, init, given.budget)
                results.setdefault(target, {}).setdefault(label, []).append(row)
                print(target, seed, label, row, flush=True)
                write_json(given.json, {"runs": results, "table": _table(results)})
    return 0


def _table(results: dict[str, dict[str, list[dict[str, Any]]]]) -> dict[str, Any]:
    return {
        target: {
            label: {
                "seeds": len(rows),
                "heldout_nll": fmean(r["heldout_nll"] for r in rows),
                "sd": stdev([r["heldout_nll"] for r in rows]) if len(rows) > 1 else None,
                "accuracy": fmean(r["accuracy"] for r in rows),
                "passes": fmean(r["passes"] for r in rows),
            }
            for label, rows in by_label.items()
        }
        for target, by_label in results.items()
    }


if __name__ == "__main__":
    raise SystemExit(main())
