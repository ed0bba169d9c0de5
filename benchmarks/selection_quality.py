"""Does the selection help? Held-out loss of a target model against controls, on labelled text.

    python benchmarks/selection_quality.py --data DATA --json OUT [--store DIR] [--targets books]

DATA holds `pool/pool-*.parquet` and `targets/NAME-{train,heldout}.parquet`. Every figure comes from
`stillhouse run`'s own job in one Ray session and one store, so that targets share tokens, prior and
prior scores, and running again only does what is missing. Stages:

* main: for each target, the loss after training on the selection and on controls of equal size,
  paired by seed; and how well the scores alone find the sequences of the target's source.
* flops: for the first target, `random` with as many more tokens as the auxiliary models cost.
* tau: for the first target, the loss against tau, each trained on one pass over its selection.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from quality_tables import CONTROLS, shortfalls, tables

from stillhouse.jobs.cluster import cluster
from stillhouse.jobs.progress import Lines
from stillhouse.jobs.run import run_job
from stillhouse.models.inspection import inspect_model
from stillhouse.models.shape import read_header
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.inputs import list_job_inputs, open_job_inputs
from stillhouse.pipelines.models import Models
from stillhouse.pipelines.select import run_select
from stillhouse.pipelines.selection import select
from stillhouse.selection.color import color_score
from stillhouse.selection.rules import find_rule
from stillhouse.spec import SelectSpec
from stillhouse.storage.artifact import Store, load_manifest
from stillhouse.storage.filesystem import use_options
from stillhouse.storage.parquet import read_table
from stillhouse.text.pieces import read_pieces, row_sources

MIXTURE = ("books", "arxiv_abstracts")
TARGETS: dict[str, tuple[str, ...]] = {
    "books": ("books",),
    "arxiv_abstracts": ("arxiv_abstracts",),
    "math_word_problems": ("math_word_problems",),
    "mixture": MIXTURE,
}
TAU = {"books": 12.0, "arxiv_abstracts": 32.0, "math_word_problems": 64.0, "mixture": 8.0}
"""About the share of the pool that the target's own sources have and the prior has not seen, at
most 64."""
TAUS = (32.0, 16.0, 8.0, 4.0, 2.0)
LENGTH = 128
MAX_HELDOUT_CHARS = 1_000_000
"""Measured on evenly spaced documents of the held-out file, for its loss to be known to 0.01."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is trained on what; `--quick` shrinks it to find mistakes, not figures."""

    prior_tokens: int = 2_900_000
    conditional_tokens: int = 1_200_000
    part_tokens: int = 1_000_000
    tokenizer_bytes: int = 8_000_000
    train_tokens: int | None = None


QUICK = Sizes(60_000, 40_000, 1_000_000, 500_000, 40_000)


@dataclass(frozen=True, slots=True)
class Bench:
    """What was asked for on the command line."""

    data: Path
    store: str
    seeds: tuple[int, ...]
    shards: int
    sizes: Sizes

    def files(self, target: str, split: str) -> list[str]:
        """Files of one split of a target; held-out ones thinned to `MAX_HELDOUT_CHARS`."""
        paths = [self.data / "targets" / f"{name}-{split}.parquet" for name in TARGETS[target]]
        return [str(p if split == "train" else self._thinned(p)) for p in paths]

    def _thinned(self, path: Path) -> Path:
        thin = Path(self.store) / "inputs" / path.name
        if not thin.exists():
            table = pq.read_table(path)
            chars = sum(len(text) for text in table["text"].to_pylist())
            thin.parent.mkdir(parents=True, exist_ok=True)
            step = max(1, round(chars / MAX_HELDOUT_CHARS))
            pq.write_table(table.take(np.arange(0, table.num_rows, step)), thin)
        return thin

    def spec(
        self,
        target: str,
        tau: float,
        *,
        controls: Sequence[str] = (),
        seeds: Sequence[int] = (0,),
        num_tokens: int | None = None,
    ) -> SelectSpec:
        """The job: everything but the selection's size and the trainings is the same for all."""
        pool = sorted((self.data / "pool").glob("pool-*.parquet"))[: self.shards]
        learning = {"learning_rate": 4e-3, "global_batch": 8, "final_learning_rate": 0.05}
        sizes = self.sizes
        return SelectSpec.model_validate(
            {
                "job": "select",
                "name": f"{target}, tau {tau:g}",
                "store": self.store,
                "pool": {"path": [str(path) for path in pool]},
                "target": {
                    "path": self.files(target, "train"),
                    "heldout": {"path": self.files(target, "heldout")},
                },
                "tokenizer": {"train": {"vocab_size": 4096, "num_bytes": sizes.tokenizer_bytes}},
                "sequence_length": LENGTH,
                "part_tokens": sizes.part_tokens,
                "prior": {"model": {}, "num_tokens": sizes.prior_tokens, **learning},
                "conditional": {
                    "num_tokens": sizes.conditional_tokens,
                    **learning,
                    "learning_rate": 2e-3,
                },
                "scoring": {"dtype": "float32", "compile": "on"},
                "selection": {"tau": tau},
                "train": {
                    "controls": list(controls),
                    "seeds": list(seeds),
                    "num_tokens": num_tokens or sizes.train_tokens,
                    "eval_points": 1,
                    **learning,
                    "learning_rate": 2e-3,
                },
                "compute": {"scorers": 2, "trainers": 2},
            }
        )


def label_quality(store: str, result: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """How well color's and dsir's scores find the sequences that `names` own most of.

    Over all sequences of the pool, those the prior was trained on among them.
    """
    tokens = load_manifest(result["artifacts"]["tokens"])
    own = np.concatenate(
        [_owned(f"{store}/{part.path}", names) for part in tokens.parts], dtype=np.bool_
    )
    uris: dict[str, str] = result["artifacts"]["scores"]
    values = {name: _values(store, uri) for name, uri in uris.items()}
    ranks = {"color": color_score(values["prior"], values["conditional"])}
    ranks |= {"conditional_only": -values["conditional"]}
    ranks |= {"dsir": values["dsir"]} if "dsir" in values else {}
    found: dict[str, Any] = {"num_sequences": len(own), "num_positive": int(own.sum())}
    for rule, score in ranks.items():
        found[rule] = {"auc": auc(score, own), "recall_at_k": recall_at_k(score, own)}
    return found


def _owned(uri: str, names: Sequence[str]) -> NDArray[np.bool_]:
    pieces = read_pieces(read_table(uri, ["documents"]))
    labels = np.array([name in names for name in pieces.sources])
    return labels[row_sources(pieces, "sequences")]


def _values(store: str, uri: str) -> NDArray[np.float32]:
    parts = load_manifest(uri).parts
    tables = [read_table(f"{store}/{part.path}", ["value"]) for part in parts]
    return np.concatenate([table["value"].to_numpy() for table in tables])


def auc(score: NDArray[np.float32], positive: NDArray[np.bool_]) -> float:
    """Probability that a positive row scores above a negative one; ties count a half."""
    _, place, counts = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[place]
    n = int(positive.sum())
    return float((rank[positive].sum() - n * (n + 1) / 2) / (n * (len(score) - n)))


def recall_at_k(score: NDArray[np.float32], positive: NDArray[np.bool_]) -> float:
    """Share of the positive rows among the k highest, k their number (also the precision)."""
    k = int(positive.sum())
    return float(positive[np.argsort(-score, kind="stable")[:k]].mean())


def losses(result: dict[str, Any]) -> dict[str, Any]:
    """By rule: the held-out loss of every seed, their mean and spread; color's paired gains."""
    by_seed = {rule: t["heldout_nll_by_seed"] for rule, t in result["target"].items()}
    gains = {
        rule: [other - own for other, own in zip(nll, by_seed["color"], strict=True)]
        for rule, nll in by_seed.items()
        if rule != "color"
    }
    return {
        "num_tokens": result["target"]["color"]["num_tokens"],
        "heldout_nll": {rule: _spread(nll) for rule, nll in by_seed.items()},
        "color_gain_over": {rule: _spread(gain) for rule, gain in gains.items()},
    }


def _spread(values: list[float]) -> dict[str, Any]:
    deviation = stdev(values) if len(values) > 1 else None
    return {"mean": fmean(values), "stdev": deviation, "by_seed": values}


def kept_shares(result: dict[str, Any], names: Sequence[str]) -> dict[str, float]:
    """Share of the target's sources in the pool's and in the kept tokens."""
    sources = result["selection"]["sources"]
    return {
        key: sum(sources[n][f"{key}_tokens"] for n in names)
        / sum(source[f"{key}_tokens"] for source in sources.values())
        for key in ("pool", "kept")
    }


def run_main(bench: Bench, target: str) -> dict[str, Any]:
    """Selection, controls, and the target models of all seeds."""
    spec = bench.spec(target, TAU[target], controls=CONTROLS, seeds=bench.seeds)
    result = run_job(spec, Lines())
    names = TARGETS[target]
    return {
        "target": target,
        "tau": TAU[target],
        "run": result["run"],
        "losses": losses(result),
        "labels": label_quality(bench.store, result, names),
        "share": kept_shares(result, names),
        "fates": result["selection"]["fates"],
        "flops": auxiliary_flops(result),
        "warnings": result["warnings"],
    }


def flops_per_token(model: str) -> int:
    """FLOPs of a forward pass of a model artifact."""
    return inspect_model(read_header(model, model)).flops_per_token(LENGTH)


def auxiliary_flops(result: dict[str, Any]) -> dict[str, float]:
    """Counted FLOPs of what CoLoR-Filter does before the target is trained, and of one training."""
    artifacts, counted = result["artifacts"], result["cost"]["flops"]
    found: dict[str, float] = {}
    for name in ("prior", "conditional"):
        per_token = flops_per_token(artifacts[name])
        found[f"train {name}"] = (
            3.0 * per_token * load_manifest(artifacts[name]).totals["num_tokens"]
        )
        found[f"score {name}"] = float(counted[f"score {name}"])
    model = artifacts["targets"]["color"][0]
    tokens = load_manifest(model).totals["num_tokens"]
    found["target"] = 3.0 * flops_per_token(model) * tokens
    return found


def run_flops(bench: Bench, target: str, done: dict[str, Any]) -> dict[str, Any]:
    """`random` on fresh sequences with all the FLOPs of `done`'s color; the first seed.

    Where the pool has too few eligible sequences it goes on to further epochs over them.
    """
    flops = done["flops"]
    ratio = sum(flops.values()) / flops["target"]
    tokens = round(done["losses"]["num_tokens"] * ratio)
    seeds = bench.seeds[:1]
    spec = bench.spec(target, TAU[target], controls=CONTROLS, seeds=bench.seeds)
    ctx = Context(Store(bench.store), spec.compute, Lines())
    made = run_select(ctx, spec, open_job_inputs(ctx.store, spec, list_job_inputs(spec)))
    eligible = made.pool.manifest.num_rows - sum(
        count
        for reason, count in made.selections["color"].tally.fates.items()
        if reason in ("contaminated", "prior row", "nan")
    )
    longer = bench.spec(target, TAU[target], seeds=seeds, num_tokens=tokens)
    size = min(eligible, tokens // LENGTH)
    rows = select(ctx, made.candidates, find_rule("rule", "random"), size).manifest
    models = Models(ctx, longer, made.tokenizer, {})
    trained = models.targets({"random": rows}, made.heldout.manifest)["random"][0]
    color = done["losses"]["heldout_nll"]["color"]["by_seed"][0]
    random = trained.totals["curve"][-1][1]
    return {
        "target": target,
        "total_flops": sum(flops.values()),
        "random_tokens": trained.totals["num_tokens"],
        "random_unique_tokens": rows.num_tokens,
        "color": color,
        "random": random,
        "color_gain": random - color,
    }


def run_tau(bench: Bench, target: str, tau: float) -> dict[str, Any]:
    """One training on the whole selection."""
    result = run_job(bench.spec(target, tau, seeds=bench.seeds[:1]), Lines())
    target_model = result["target"]["color"]
    return {
        "tau": tau,
        "num_tokens": target_model["num_tokens"],
        "heldout_nll": target_model["heldout_nll"],
        "share": kept_shares(result, TARGETS[target]),
    }


def run_stages(bench: Bench, targets: Sequence[str], stages: Sequence[str], out: Path) -> None:
    """All that was asked for; OUT is written anew after every figure."""
    report: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "sizes": asdict(bench.sizes),
        "main": [],
        "flops": [],
        "tau": [],
    }

    def add(stage: str, row: dict[str, Any]) -> None:
        report[stage].append(row)
        report["missed"] = shortfalls(report)
        out.write_text(json.dumps(report, indent=1))
        print(tables(report), flush=True)

    for target in targets if "main" in stages or "flops" in stages else ():
        add("main", run_main(bench, target))
    if "tau" in stages:
        for tau in TAUS:
            add("tau", run_tau(bench, targets[0], tau))
    if "flops" in stages:
        add("flops", run_flops(bench, targets[0], report["main"][0]))
    print("\nfloors missed: " + ("; ".join(report["missed"]) or "none"))


def main() -> None:
    """Parse, run in one Ray session, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--store", default="bench_store")
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--stage", default="main,flops,tau")
    parser.add_argument("--quick", action="store_true", help="tiny trainings, no figures")
    options = parser.parse_args()
    bench = Bench(
        data=options.data.resolve(),
        store=str(Path(options.store).resolve()),
        seeds=tuple(int(seed) for seed in options.seeds.split(",")),
        shards=options.shards,
        sizes=QUICK if options.quick else Sizes(),
    )
    targets = options.targets.split(",")
    compute = bench.spec(targets[0], 2.0).compute
    # Ray starts its workers at niceness 15, too little on a machine that does anything else
    os.environ.update(RAY_worker_niceness="0")
    with cluster(compute, use_options(bench.store, {}), compute.scorers):
        run_stages(bench, targets, options.stage.split(","), options.json)


if __name__ == "__main__":
    main()
