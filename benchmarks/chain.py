"""Is a chain worth its FLOPs? Its target against targets of equal FLOPs that leave steps out.

    python benchmarks/chain.py --data DATA --store STORE --json OUT.json [--small]

One chain: a base, a selection for books with it as the prior, a teacher, and targets of three
seeds. Every arm has the same FLOPs; what it saves on steps, its target is trained for longer:

* both: select, train a teacher on what was kept, distil it into the target
* selected: select, no teacher
* taught: a teacher and a target on random data
* neither: random data alone

Beside these, targets on as many tokens as that of `both` (`... at equal tokens`). Scoring counts
two passes over the pool, a teacher's pass is counted once for each token that it answers for. The
loss is that on held-out books, in nats a token. DATA holds `pool/pool-*.parquet` and
`targets/books-*.parquet`; running again does what is missing. `--small` finds mistakes.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from teacher_models import LENGTH, VOCABULARY, Bench

import stillhouse

BASE = {"hidden_size": 128, "num_layers": 2}
STUDENT = {"hidden_size": 128, "num_layers": 3}
TEACHER = {"hidden_size": 192, "num_layers": 4}
POOL, BASE_TOKENS, CONDITIONAL, TEACHER_TOKENS, TARGET, TAU = 2.0, 0.4, 0.1, 0.5, 0.5, 8
"""Millions of tokens, and the share of the pool that is kept, 1 / tau."""
SEEDS = (0, 1, 2)


def budgets(bench: Bench) -> dict[str, float]:
    """Millions of tokens that each arm's target is trained on, all with the FLOPs of `both`."""
    base, student, teacher = (bench.flops(sizes) for sizes in (BASE, STUDENT, TEACHER))
    selecting = 3 * base * (BASE_TOKENS + CONDITIONAL) + 2 * base * POOL
    teaching = 3 * teacher * TEACHER_TOKENS
    answers = teacher * min(TARGET, POOL / TAU)
    total = selecting + teaching + answers + 3 * student * TARGET
    left = {
        "both": total - selecting - teaching - answers,
        "selected": total - selecting,
        "neither": total,
    }
    found = {arm: flops / (3 * student) for arm, flops in left.items()}
    # every random token is new, so that the teacher answers for each
    found["taught"] = (total - teaching) / (3 * student + teacher)
    return found


def chain_of(bench: Bench) -> dict[str, Any]:
    pool, other = (bench.texts(f"pool/pool-0{i}.parquet", POOL, seed=i) for i in (0, 1))
    random = bench.texts("pool/pool-02.parquet", max(budgets(bench).values()))
    target = bench.texts("targets/books-train.parquet", CONDITIONAL)
    heldout = bench.texts("targets/books-heldout.parquet", 0.1)

    def train(data: dict[str, str], millions: float, model: dict[str, int], **more: Any) -> Any:
        learning = {"num_tokens": bench.tokens(millions), "global_batch": 8, "eval_points": 1}
        learning |= {"learning_rate": 4e-3} | more.pop("train", {})
        step = {"job": "train", "data": data, "model": model, "train": learning}
        return step | {"sequence_length": LENGTH, "tokenizer": {"from": "base"}} | more

    kept, drawn = {"from": "choose"}, {"path": random}
    steps: dict[str, Any] = {
        "base": train({"path": other}, BASE_TOKENS, BASE)
        | {"tokenizer": {"train": {"vocab_size": VOCABULARY}}},
        "choose": {
            "job": "select",
            "pool": {"path": pool},
            "target": {"path": target, "heldout": {"path": heldout}},
            "tokenizer": {"from": "base"},
            "sequence_length": LENGTH,
            "prior": {"from": "base"},
            "conditional": {"epochs": 1},
            "selection": {"tau": TAU},
        },
        "teacher": train(kept, TEACHER_TOKENS, TEACHER, train={"learning_rate": 2e-3}),
        "random-teacher": train(drawn, TEACHER_TOKENS, TEACHER, train={"learning_rate": 2e-3}),
    }
    equal = dict.fromkeys(("selected", "taught", "neither"), TARGET)
    arms = budgets(bench) | {f"{arm} at equal tokens": size for arm, size in equal.items()}
    for arm, millions in arms.items():
        kind = arm.split()[0]
        data = kept if kind in ("both", "selected") else drawn
        teacher = {"both": "teacher", "taught": "random-teacher"}.get(kind)
        for seed in SEEDS[: 1 if bench.small else None]:
            learning: dict[str, Any] = {"seed": seed}
            if teacher is not None:
                taught = {"name": "distil", "teachers": [{"from": teacher}], "weight": 0.5}
                learning["objective"] = taught
            more = {"heldout": {"path": heldout}, "train": learning}
            steps[step_name(arm, seed)] = train(data, millions, STUDENT, **more)
    compute = {"scorers": 2, "trainers": 1}
    return {"job": "chain", "store": str(bench.store), "compute": compute, "steps": steps}


def step_name(arm: str, seed: int) -> str:
    return f"{arm.replace(' ', '-')}-{seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    bench = Bench(arguments.data, arguments.store.absolute(), arguments.small)
    done = stillhouse.run(chain_of(bench))["chain"]["steps"]
    found: list[dict[str, Any]] = []
    sizes = budgets(bench)
    for arm in [*sizes, *(f"{arm} at equal tokens" for arm in ("selected", "taught", "neither"))]:
        names = [name for seed in SEEDS if (name := step_name(arm, seed)) in done]
        nll = [done[name]["train"]["heldout_nll"] for name in names]
        error = float(np.std(nll, ddof=1) / len(nll) ** 0.5) if len(nll) > 1 else None
        tokens = done[names[0]]["train"]["num_tokens"]
        found.append({"arm": arm, "tokens": tokens, "nll": float(np.mean(nll)), "error": error})
        spread = "" if error is None else f" ± {error:.3f}"
        print(f"{arm:26} {tokens:>10,} tokens  {found[-1]['nll']:.3f}{spread} nats")
    arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
