"""Trainings of `benchmarks/teachers.py` with language models as teachers: cells of five stages.

Every training is a `job: train` in one store, so that running again does what is missing. DATA
holds `pool/pool-*.parquet`, `targets/books-*.parquet` and `tasks/targets.parquet`.
"""

import json
import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from stillhouse.compute_settings import ComputeSettings
from stillhouse.jobs.cluster import cluster
from stillhouse.jobs.progress import Lines
from stillhouse.jobs.run import run_job
from stillhouse.models.causal_lm import load_model, save_model
from stillhouse.models.shape import planned_shape
from stillhouse.models.sub_networks import extract, shape_of
from stillhouse.spec import ModelSettings, SelectSpec
from stillhouse.storage.filesystem import use_options
from stillhouse.text.tokenizer import load_tokenizer
from stillhouse.training.objectives.autodistil import best_sub_network, proxy_losses, space_of
from stillhouse.training.spec import TrainSpec

LENGTH, VOCABULARY = 128, 2048
COMPUTE = {"scorers": 2, "trainers": 1}
CHARS_PER_TOKEN = 3.0
SPACE = {"layers": [2, 3, 4], "heads": [2, 3, 4], "hidden": [64, 96, 128], "mlp_ratios": [3.0]}


@dataclass(frozen=True, slots=True)
class Bench:
    """Data, store and sizes; `small` finds mistakes, not figures."""

    data: Path
    store: Path
    small: bool = False

    @property
    def student(self) -> dict[str, int]:
        """1.1 M parameters."""
        return {"hidden_size": 128, "num_layers": 4}

    @property
    def teacher(self) -> dict[str, int]:
        """5.3 M parameters."""
        return {"hidden_size": 128 if self.small else 256, "num_layers": 4 if self.small else 6}

    def tokens(self, millions: float) -> int:
        """About as many, in whole steps of eight sequences."""
        step = 8 * LENGTH
        return round(millions * (1e4 if self.small else 1e6) / step + 1) * step

    def texts(self, source: str, millions: float, seed: int = 0, only: str | None = None) -> str:
        """A file of about as many tokens of `source`, a Parquet file of texts; `only` names a value
        of its column `source`.
        """
        name = f"{Path(source).stem}-{self.tokens(millions)}-{seed}" + (f"-{only}" if only else "")
        path = self.store / "inputs" / f"{name}.parquet"
        if not path.exists():
            rows = None if only is None else [("source", "==", only)]
            found = pq.read_table(self.data / source, columns=["text"], filters=rows)
            found = found["text"].to_pylist()
            order = np.random.default_rng(seed).permutation(len(found))
            kept, chars = list[str](), 0
            for i in order:
                if chars > self.tokens(millions) * CHARS_PER_TOKEN:
                    break
                kept.append(found[i])
                chars += len(found[i])
            _write(path, {"text": kept})
        return str(path)

    def task(self, split: str, count: int, *, labelled: bool) -> str:
        """Rows of SNLI: prompts and answers, or prompts alone."""
        count = min(count, 60) if self.small else count
        path = self.store / "inputs" / f"snli-{split}-{count}-{labelled}.parquet"
        if not path.exists():
            rows = pq.read_table(self.data / "tasks" / "targets.parquet").to_pylist()
            rows = [r for r in rows if (r["task"], r["split"]) == ("snli", split)][:count]
            columns = ("prompt", "completion") if labelled else ("text",)
            keys = ("input", "target")
            _write(path, {c: [r[k] for r in rows] for c, k in zip(columns, keys, strict=False)})
        return str(path)

    def train(
        self,
        data: str | dict[str, str],
        num_tokens: int,
        *,
        seed: int = 0,
        heldout: str | None = None,
        model: dict[str, Any] | None = None,
        init: str | None = None,
        objective: dict[str, Any] | None = None,
        rate: float = 4e-3,
    ) -> dict[str, Any]:
        """A training: the folder of its `model`, and the last held-out loss `nll`.

        Args:
            data: a file of texts, or what the spec has as `data`.
        """
        tokenizer = self.store / "tokenizer.json"
        content: dict[str, Any] = {
            "job": "train",
            "store": str(self.store),
            "data": {"path": data} if isinstance(data, str) else data,
            "sequence_length": LENGTH,
            "train": {
                "num_tokens": num_tokens,
                "global_batch": 8,
                "learning_rate": rate,
                "seed": seed,
                "eval_points": 1,
                **({"objective": objective} if objective else {}),
            },
            "compute": COMPUTE,
        }
        content |= {"heldout": {"path": heldout}} if heldout else {}
        content |= {"init": {"path": init}} if init else {"model": model}
        if tokenizer.exists():
            content["tokenizer"] = {"path": json.loads(tokenizer.read_text())}
        else:
            content["tokenizer"] = {"train": {"vocab_size": VOCABULARY}}
        result = run_job(TrainSpec.model_validate(content), Lines())
        if not tokenizer.exists():
            tokenizer.write_text(json.dumps(result["artifacts"]["tokenizer"]))
        folder = result["artifacts"]["model"]
        totals = json.loads(Path(folder, "manifest.json").read_text())["totals"]
        return {"model": folder, "nll": totals["evaluations"][-1]["nll"]}

    def select(self, pool: str, target: str, num_tokens: int, tau: float) -> str:
        """The sequences of the pool that CoLoR-Filter keeps for a target: the selection's URI."""
        content: dict[str, Any] = {
            "job": "select",
            "store": str(self.store),
            "pool": {"path": pool},
            "target": {"path": target},
            "tokenizer": {"path": json.loads((self.store / "tokenizer.json").read_text())},
            "sequence_length": LENGTH,
            "prior": {"model": self.student, "num_tokens": num_tokens},
            "selection": {"tau": tau},
            "compute": COMPUTE,
        }
        result = run_job(SelectSpec.model_validate(content), Lines())
        return result["artifacts"]["selection"]

    def books_teacher(self) -> str:
        """Trained on books; the first training, which makes the tokenizer."""
        data = self.texts("targets/books-train.parquet", 2.0)
        made = self.train(data, self.tokens(2.0), model=self.teacher, rate=2e-3)
        return made["model"]

    def flops(self, sizes: dict[str, int]) -> int:
        """Of a model's forward pass for one token."""
        model = ModelSettings.model_validate(sizes)
        return planned_shape(model, VOCABULARY, LENGTH).flops_per_token(LENGTH)


@contextmanager
def ray_session(store: Path) -> Generator[None]:
    """One session of Ray for all trainings."""
    os.environ.update(RAY_worker_niceness="0")
    compute = ComputeSettings.model_validate(COMPUTE)
    with cluster(compute, use_options(str(store), {}), compute.scorers):
        yield


def _write(path: Path, columns: dict[str, list[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def distil_cell(bench: Bench, seed: int, arm: str) -> dict[str, float]:
    """Held-out loss on books of a student.

    Arms: `distil`, half of the loss from the teacher; `ce`, the same text alone; `flops`, the text
    alone, with as many FLOPs more as the teacher's scoring took, on more text.
    """
    teacher, tokens = bench.books_teacher(), bench.tokens(0.6)
    heldout = bench.texts("targets/books-heldout.parquet", 0.15)
    data = bench.texts("targets/books-train.parquet", 0.6)
    objective = None
    if arm == "distil":
        objective = {"name": "distil", "teachers": [{"path": teacher}], "weight": 0.5}
    if arm == "flops":
        own = 3 * bench.flops(bench.student)
        millions = 0.6 * (own + bench.flops(bench.teacher)) / own
        tokens = bench.tokens(millions)
        data = bench.texts("targets/books-train.parquet", millions)
    made = bench.train(
        data, tokens, seed=seed, heldout=heldout, model=bench.student, objective=objective
    )
    return {"nll": made["nll"], "tokens": float(tokens)}


def selected_cell(bench: Bench, seed: int, arm: str) -> dict[str, float]:
    """Held-out loss on books of a student of 400 thousand tokens of the pool.

    Arms: `random` documents; `selected`, the sequences of one in eight that CoLoR-Filter keeps for
    books; either by the text alone or, `+distil`, also from the teacher of the stage `distil`.
    """
    teacher = bench.books_teacher()
    heldout = bench.texts("targets/books-heldout.parquet", 0.15)
    if arm.startswith("selected"):
        pool = bench.texts("pool/pool-00.parquet", 4.0)
        target = bench.texts("targets/books-train.parquet", 0.6)
        data = {"from": bench.select(pool, target, bench.tokens(0.8), 8)}
    else:
        data = bench.texts("pool/pool-00.parquet", 0.4, seed)
    distil = {"name": "distil", "teachers": [{"path": teacher}], "weight": 0.5}
    made = bench.train(
        data,
        bench.tokens(0.4),
        seed=seed,
        heldout=heldout,
        model=bench.student,
        objective=distil if arm.endswith("+distil") else None,
    )
    return {"nll": made["nll"]}


def wellread_cell(bench: Bench, seed: int, arm: str) -> dict[str, float]:
    """Held-out loss on books after fine-tuning on 60 thousand tokens of them.

    Arms, of equal tokens: `pd`, pre-trained on the pool, then distilled on film reviews, which are
    neither; `pf`, pre-trained alone, for longer; `d`, distilled from random weights, for longer;
    and `s`, fine-tuned only. The teacher was pre-trained, and fine-tuned on 0.4 M tokens of books.
    """
    bench.books_teacher()  # the tokenizer
    general, reviews = "pool/pool-00.parquet", "movie_reviews"
    books = "targets/books-train.parquet"
    read = bench.train(bench.texts(general, 2.0), bench.tokens(1.5), model=bench.teacher, rate=2e-3)
    teacher = bench.train(bench.texts(books, 0.4), bench.tokens(0.4), init=read["model"], rate=1e-3)
    transfer = bench.texts(general, 0.25, only=reviews)
    return _well_read(
        bench,
        seed,
        arm,
        teacher["model"],
        transfer,
        bench.texts(books, 0.06, seed=1),
        bench.texts("targets/books-heldout.parquet", 0.15),
        bench.tokens(0.12),
    )


def snli_cell(bench: Bench, seed: int, arm: str) -> dict[str, float]:
    """The same on the answers of SNLI, 19 passes over 200 rows, with its prompts as transfer text.

    The teacher was fine-tuned on 1,000 rows.
    """
    bench.books_teacher()  # the tokenizer
    general = bench.texts("pool/pool-00.parquet", 2.0)
    labelled = bench.task("train", 1000, labelled=True)
    read = bench.train(general, bench.tokens(1.5), model=bench.teacher, rate=2e-3)
    teacher = bench.train(labelled, bench.tokens(0.4), init=read["model"], rate=1e-3)
    return _well_read(
        bench,
        seed,
        arm,
        teacher["model"],
        bench.task("train", 1000, labelled=False),
        bench.task("train", 200, labelled=True),
        bench.task("test", 1000, labelled=True),
        bench.tokens(0.15),
    )


def _well_read(
    bench: Bench,
    seed: int,
    arm: str,
    teacher: str,
    transfer: str,
    labelled: str,
    heldout: str,
    last: int,
) -> dict[str, float]:
    """One arm: pre-trained on the pool, distilled on `transfer`, fine-tuned on `last` tokens."""
    taught = {"name": "distil", "teachers": [{"path": teacher}], "weight": 1.0}
    general, student, start = bench.texts("pool/pool-00.parquet", 2.0), bench.student, None
    tokens = bench.tokens(0.4)
    if arm in ("pd", "pf"):
        amount = tokens * (2 if arm == "pf" else 1)
        start = bench.train(general, amount, seed=seed, model=student)["model"]
    if arm in ("pd", "d"):
        amount = tokens * (2 if arm == "d" else 1)
        options = {"init": start} if start else {"model": student}
        made = bench.train(transfer, amount, seed=seed, objective=taught, **options)
        start = made["model"]
    made = bench.train(
        labelled,
        last,
        seed=seed,
        heldout=heldout,
        rate=1e-3,
        **({"init": start} if start else {"model": student}),
    )
    return {"nll": made["nll"]}


def autodistil_cell(bench: Bench, seed: int) -> dict[str, float]:
    """Do relation losses in the super-network rank students as their own training does?

    The super-network is the student of the stage `distil`, and its own teacher. Nine of 27
    sub-networks are extracted and fine-tuned on books.
    """
    bench.books_teacher()  # the tokenizer
    data = bench.texts("targets/books-train.parquet", 0.6)
    heldout = bench.texts("targets/books-heldout.parquet", 0.15)
    start = bench.train(data, bench.tokens(0.6), seed=seed, heldout=heldout, model=bench.student)[
        "model"
    ]
    objective = {"name": "autodistil", "teachers": [{"path": start}], "hard_weight": 0.1, **SPACE}
    made = bench.train(
        data, bench.tokens(0.3), seed=seed, init=start, objective=objective, rate=1e-3
    )
    model, teacher = (
        load_model(path, dtype="float32", device=torch.device("cpu")).eval()
        for path in (made["model"], start)
    )
    space = space_of(model.config, **SPACE)
    ids = _sequences(json.loads((bench.store / "tokenizer.json").read_text()), heldout, 32)
    chosen = space[:: -(-len(space) // 9)]
    proxies = proxy_losses(model, teacher, chosen, ids)
    found: list[float] = []
    for size in chosen:
        folder = bench.store / "students" / f"{seed}-{size.layers}-{size.heads}-{size.hidden}"
        if not folder.exists():
            save_model(extract(model, size), folder)
        tuned = bench.train(
            data,
            bench.tokens(0.3),
            seed=seed,
            heldout=heldout,
            init=str(folder),
            rate=2e-3,
        )
        found.append(tuned["nll"])
    costs = [shape_of(model.config, one).flops_per_token(LENGTH) for one in chosen]
    limit = sorted(costs)[len(costs) // 2]
    best = best_sub_network(model, teacher, chosen, ids, limit)
    fitting = [nll for nll, cost in zip(found, costs, strict=True) if cost <= limit]
    return {
        "rank_correlation": _spearman(list(proxies.values()), found),
        "rank_correlation_of_flops": -_spearman(costs, found),
        "chosen_under_half": found[chosen.index(best)],
        "best_under_half": min(fitting),
        "mean_under_half": float(np.mean(fitting)),
    }


def _sequences(tokenizer: str, path: str, count: int) -> torch.Tensor:
    made = load_tokenizer(tokenizer)
    stream: list[int] = []
    for ids in made.encode_batch(pq.read_table(path)["text"].to_pylist()[:count]):
        stream += [*ids.tolist(), made.eos_id]
    whole = min(len(stream) // LENGTH, count) * LENGTH
    return torch.tensor(stream[:whole]).view(-1, LENGTH)


def _spearman(first: Sequence[float], second: Sequence[float]) -> float:
    ranks = [np.argsort(np.argsort(values)) for values in (first, second)]
    return float(np.corrcoef(*ranks)[0, 1])
