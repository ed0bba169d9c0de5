"""Tokens per second of scoring: a plain loop, the kernel alone, and the whole pipeline.

    python benchmarks/scoring.py --json OUT [--dir FOLDER] [--tokens 12_000_000]

All three score the same sequences with the same model on two processes of one thread each, in one
run on this machine:

* (a) what one writes first: `model(input_ids).logits` in float32, cross-entropy over all of them;
* (b) the scoring kernel alone, in two plain processes at the same time, before and after (c);
* (c) `stillhouse.pipelines.scores` with two Scorer actors, by the clock from the first finished
  part to the last; parts that were under way at its beginning are left out: a lower bound.
  What comes before the first finished part (start of the actors, compilation) is its own column.

It fails where losses differ: (b) and (c) must be equal bit for bit, (a) within the tolerance.
Text and models are made here; nothing is read from outside.
"""

import argparse
import json
import multiprocessing
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.synchronize import Barrier
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from stillhouse.jobs.cluster import cluster
from stillhouse.models.causal_lm import load_model
from stillhouse.models.scoring import load_scoring_model
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.inputs import list_job_inputs, open_job_inputs
from stillhouse.pipelines.models import ModelRef, Models
from stillhouse.pipelines.scan import scan
from stillhouse.pipelines.scores import PoolScores, Scores
from stillhouse.pipelines.tokenizer import scanned_tokenizer
from stillhouse.pipelines.tokens import TokenizerRef, tokenise_job, without_dropped
from stillhouse.selection.budget import top_k
from stillhouse.selection.color import color_score
from stillhouse.spec import ScoringSettings, SelectSpec
from stillhouse.storage.artifact import Manifest, Store
from stillhouse.storage.parquet import read_table
from stillhouse.text.pieces import token_ids

ACTORS = 2
LENGTH, VOCAB = 128, 4096
PART_TOKENS = 131_072
PLAIN_BATCH = 32
PLAIN_SHARE = 8
"""(a) scores one part in eight: its rate is steady, and it is slow."""
TAU = 8
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-3}
"""Largest difference of any sequence's mean loss from (a)'s, nats."""
SETTINGS = (("float32", "off"), ("float32", "on"), ("bfloat16", "on"))
MIN_WORK_S = 60.0
_WAIT_S = 300  # for the other process, compilation included

Losses = dict[int, NDArray[np.float32]]


@dataclass(slots=True)
class Clock:
    """A listener that notes when each part of a step was finished."""

    begun: float = 0.0
    times: list[float] = field(default_factory=list)
    amounts: list[float] = field(default_factory=list)

    def begin(self, step: str, total: int, reused: int, unit: str) -> None:
        """Start again for this step."""
        self.begun, self.times, self.amounts = perf_counter(), [], []

    def advance(self, step: str, done: float, amount: float) -> None:
        """A part is finished."""
        self.times.append(perf_counter())
        self.amounts.append(amount)

    def end(self, step: str, seconds: float) -> None:
        """Nothing to note."""

    def note(self, kind: str, content: dict[str, Any]) -> None:
        """Nothing to note."""

    def measured(self) -> tuple[float, float, float]:
        """Tokens and seconds from the first finished part on, and seconds until then."""
        seconds = self.times[-1] - self.times[0]
        return sum(self.amounts[ACTORS:]), seconds, self.times[0] - self.begun


@dataclass(frozen=True, slots=True)
class Prepared:
    """A store with tokens and two models."""

    store: Store
    spec: SelectSpec
    words: TokenizerRef
    pool: Manifest
    models: dict[str, ModelRef]

    def tokens(self, part: int) -> str:
        """URI of a token part."""
        return self.store.path(self.pool.parts[part].path)


def write_text(folder: Path, num_tokens: int) -> None:
    """Documents of words drawn by Zipf's law, two kinds of them; the target's are of one kind."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(rng.choice(letters, n)) for n in rng.integers(2, 7, 3000)]
    folder.mkdir(parents=True)
    kinds = np.array([words, words[::-1]])
    for name, tokens, mixed in (("pool", num_tokens, 2), ("target", 400_000, 1)):
        ranks = np.minimum(rng.zipf(1.3, (tokens // 512, 400)), 3000) - 1
        kind = rng.integers(0, mixed, len(ranks))
        texts = [" ".join(kinds[k][row]) for k, row in zip(kind, ranks, strict=True)]
        pq.write_table(pa.table({"text": texts}), folder / f"{name}.parquet", row_group_size=256)


def make_spec(folder: Path) -> SelectSpec:
    """Small trainings: losses must be spread as a trained model's, nothing else."""
    return SelectSpec.model_validate(
        {
            "job": "select",
            "store": str(folder / "store"),
            "pool": {"path": str(folder / "text" / "pool.parquet")},
            "target": {"path": str(folder / "text" / "target.parquet")},
            "tokenizer": {"train": {"vocab_size": VOCAB, "num_bytes": 2_000_000}},
            "sequence_length": LENGTH,
            "part_tokens": PART_TOKENS,
            "deduplicate": False,
            "prior": {"model": {}, "num_tokens": 200_000, "learning_rate": 4e-3},
            "conditional": {"num_tokens": 100_000},
            "selection": {"tau": TAU},
            "compute": {"scorers": ACTORS},
        }
    )


def prepare(folder: Path, num_tokens: int, clock: Clock) -> tuple[Prepared, Context]:
    """Text, tokens and models, made by the pipeline."""
    if not folder.exists():
        write_text(folder / "text", num_tokens)
    spec = make_spec(folder)
    ctx = Context(Store(spec.store), spec.compute, clock)
    scans = scan(ctx, open_job_inputs(ctx.store, spec, list_job_inputs(spec)))
    words = scanned_tokenizer(ctx, spec.tokenizer, spec.pool.paths, [scans.pool])
    packings = without_dropped(ctx, spec, scans, words)
    pool, targets, _ = tokenise_job(ctx, spec.sequence_length, packings, words)
    tokens = {key: one.manifest for key, one in targets.items()}
    with Models(ctx, spec, words, {}) as models:
        prior = models.prior(pool.manifest, lambda _: None)
        both = {"prior": prior, "conditional": models.conditional(prior, tokens)}
    return Prepared(ctx.store, spec, words, pool.manifest, both), ctx


def plain_loop(folder: str, blocks: Sequence[NDArray[Any]], barrier: Barrier) -> Any:
    """(a) in one process: seconds, and each block's mean losses."""
    torch.set_num_threads(1)
    model = load_model(folder, dtype="float32", device=torch.device("cpu"))

    def run(block: NDArray[Any]) -> NDArray[np.float32]:
        losses: list[torch.Tensor] = []
        with torch.inference_mode():
            for ids in torch.from_numpy(block.astype(np.int64)).split(PLAIN_BATCH):
                logits = model(input_ids=ids).logits.float()[:, :-1]
                nll = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
                losses.append(nll.view(len(ids), -1).mean(1))
        return torch.cat(losses).numpy()

    return _timed(run, blocks, barrier)


def kernel_alone(
    folder: str, blocks: Sequence[NDArray[Any]], barrier: Barrier, settings: ScoringSettings
) -> Any:
    """(b) in one process: seconds, and each block's mean losses."""
    model = load_scoring_model(folder, settings, device="cpu", gpus=0, threads=1)
    return _timed(
        lambda block: model.token_nll(block).mean(axis=1, dtype=np.float64).astype(np.float32),
        blocks,
        barrier,
    )


def _timed(run: Any, blocks: Sequence[NDArray[Any]], barrier: Barrier) -> Any:
    run(blocks[0][:64])
    barrier.wait(_WAIT_S)
    started = perf_counter()
    losses = [run(block) for block in blocks]
    return perf_counter() - started, losses


def _process(target: Any, uris: Sequence[str], pipe: Any, arguments: tuple[Any, ...]) -> None:
    blocks = [token_ids(read_table(uri, ["input_ids"])) for uri in uris]
    pipe.send(target(arguments[0], blocks, *arguments[1:]))


def side_by_side(target: Any, made: Prepared, parts: Sequence[int], *more: Any) -> Any:
    """Run (a) or (b) on every second part in each of two processes; tokens, seconds, losses."""
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(ACTORS)
    arguments = (made.models["prior"].folder, barrier, *more)
    shares = [list(parts[i::ACTORS]) for i in range(ACTORS)]
    pipes = [spawn.Pipe(duplex=False) for _ in shares]
    for share, (_, send) in zip(shares, pipes, strict=True):
        given = (target, [made.tokens(part) for part in share], send, arguments)
        spawn.Process(target=_process, args=given, daemon=True).start()
        send.close()  # so that a process that dies ends the wait below
    answers = [receive.recv() for receive, _ in pipes]
    losses: Losses = {}
    for share, (_, found) in zip(shares, answers, strict=True):
        losses |= dict(zip(share, found, strict=True))
    rate = sum(sum(len(block) for block in found) * LENGTH / seconds for seconds, found in answers)
    return rate, losses


def pipeline(ctx: Context, made: Prepared, settings: ScoringSettings, name: str) -> Scores:
    """(c): the scores of one model over all parts; `ctx.listener` knows the times."""
    spec = made.spec.model_copy(update={"scoring": settings})
    nothing = replace(made.pool, parts=())
    scoring = PoolScores(ctx, spec, made.words, made.pool, nothing)
    return scoring.losses(name, made.models[name])


def values(made: Prepared, scores: Scores) -> Losses:
    """The stored values of every part."""
    tables = (read_table(made.store.path(path), ["value"]) for path in scores.paths)
    return {i: table["value"].to_numpy() for i, table in enumerate(tables)}


def largest_difference(some: Losses, others: Losses) -> float:
    """Over the parts that both have."""
    return max(float(np.abs(some[p] - others[p]).max()) for p in some.keys() & others.keys())


def measure(
    ctx: Context, clock: Clock, made: Prepared, dtype: Any, compiled: Any
) -> tuple[dict[str, Any], Losses, Losses]:
    """(b), (c), (b) with one setting; the figures, the prior's losses, and color's scores."""
    settings = ScoringSettings(dtype=dtype, compile=compiled)
    shutil.rmtree(made.store.path("scores"), ignore_errors=True)
    parts = range(len(made.pool.parts))
    half = parts[: len(parts) // 2]
    before, alone = side_by_side(kernel_alone, made, half, settings)
    prior = values(made, pipeline(ctx, made, settings, "prior"))
    tokens, seconds, start_up = clock.measured()
    after, _ = side_by_side(kernel_alone, made, half, settings)
    conditional = values(made, pipeline(ctx, made, settings, "conditional"))
    row = {
        "dtype": dtype,
        "compile": compiled,
        "kernel_tokens_per_s": (before + after) / 2,
        "kernel_tokens_per_s_each": [before, after],
        "pipeline_tokens_per_s": tokens / seconds,
        "pipeline_s": seconds,
        "start_up_s": start_up,
        "difference_b_c": largest_difference(alone, prior),
    }
    color = {p: color_score(prior[p], conditional[p]) for p in prior}
    return row, prior, color


def same_rows(ours: Losses, reference: Losses) -> tuple[int, int]:
    """How many of the rows kept at tau are kept with the reference's scores too, and how many."""
    k = sum(map(len, reference.values())) // TAU
    mine, theirs = (top_k(dict(sorted(x.items())), k=k) for x in (ours, reference))
    return sum(int((mine[p] & theirs[p]).sum()) for p in mine), k


def run(folder: Path, num_tokens: int, out: Path) -> list[str]:
    """All rows; OUT is written at the end. Returns what went wrong."""
    clock = Clock()
    # Ray starts its workers at niceness 15: on a busy machine that alone would favour (a) and (b)
    os.environ.update(RAY_worker_niceness="0")
    with cluster(make_spec(folder).compute, {}, make_spec(folder).num_actors):
        made, ctx = prepare(folder, num_tokens, clock)
        num_parts = len(made.pool.parts)
        chosen = range(max(ACTORS, num_parts // PLAIN_SHARE))
        plain, plain_losses = side_by_side(plain_loop, made, chosen)
        rows: list[dict[str, Any]] = []
        reference: Losses = {}
        for dtype, compiled in SETTINGS:
            row, losses, color = measure(ctx, clock, made, dtype, compiled)
            reference = reference or color
            kept, k = same_rows(color, reference)
            row |= {
                "plain_tokens_per_s": plain,
                "kernel_over_plain": row["kernel_tokens_per_s"] / plain,
                "pipeline_over_kernel": row["pipeline_tokens_per_s"] / row["kernel_tokens_per_s"],
                "difference_a_c": largest_difference(plain_losses, losses),
                "same_rows_kept": kept,
                "rows_kept": k,
            }
            rows.append(row)
            print(table([row], header=len(rows) == 1), flush=True)
    out.write_text(json.dumps({"tokens": made.pool.num_tokens, "rows": rows}, indent=1))
    return [problem for row in rows for problem in problems(row)]


def problems(row: dict[str, Any]) -> list[str]:
    """Unequal losses, and too short a measurement."""
    label, found = f"{row['dtype']}, compile {row['compile']}: ", list[str]()
    if row["difference_b_c"] != 0:
        found.append(f"{label}kernel and pipeline differ by {row['difference_b_c']}")
    if row["difference_a_c"] > TOLERANCE[row["dtype"]]:
        found.append(f"{label}plain loop and pipeline differ by {row['difference_a_c']}")
    if row["pipeline_s"] < MIN_WORK_S:
        found.append(f"{label}{row['pipeline_s']:.0f} s of work are too few: raise --tokens")
    return found


def table(rows: Sequence[dict[str, Any]], *, header: bool) -> str:
    """The figures as Markdown."""
    lines = [
        "| dtype | compile | a, tokens/s | b, tokens/s | c, tokens/s | b/a | c/b | c, s "
        "| start-up, s | max diff b-c | max diff a-c | same rows kept |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        cells = [r["dtype"], r["compile"]]
        cells += [f"{r[f'{n}_tokens_per_s']:,.0f}" for n in ("plain", "kernel", "pipeline")]
        cells += [f"{r['kernel_over_plain']:.2f}", f"{r['pipeline_over_kernel']:.2f}"]
        cells += [f"{r['pipeline_s']:.0f}", f"{r['start_up_s']:.0f}"]
        cells += [f"{r['difference_b_c']:.1e}", f"{r['difference_a_c']:.1e}"]
        cells += [f"{r['same_rows_kept']:,} of {r['rows_kept']:,}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines if header else lines[2:])


def main() -> None:
    """Parse, measure, fail on unequal losses."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--dir", type=Path, default=Path("bench_scoring"))
    parser.add_argument("--tokens", type=int, default=12_000_000)
    options = parser.parse_args()
    wrong = run(options.dir.resolve(), options.tokens, options.json)
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
