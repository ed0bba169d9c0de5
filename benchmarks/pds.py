"""What PDS picks from a pool, beside CoLoR's difference of losses and a random choice.

    PYTHONPATH=examples python benchmarks/pds.py --data FOLDER --json OUT

FOLDER holds `pool/pool-00.parquet`, `targets/books-train.parquet` and `books-heldout.parquet` with
columns `text` and `source`. All three use one small model of bytes on one thread. CoLoR's prior is
trained as long as PDS's run (warm-up and counted steps), its conditional goes on from there on the
target. For each choice: the share of books in it, and the mean NLL of held-out books, in nats per
byte, under small models trained on it alone.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from pds_scorer import PdsScorer

TARGET_STEPS, TRAIN_STEPS, SEEDS = 100, 300, 3


def read(path: Path, count: int, seed: int) -> tuple[list[str], list[str]]:
    """`count` random texts of a file, and their sources."""
    table = pq.read_table(path, columns=["text", "source"])
    rows = np.random.default_rng(seed).permutation(table.num_rows)[:count]
    taken = table.take(rows)
    return taken["text"].to_pylist(), taken["source"].to_pylist()


class Losses:
    """Mean NLL of texts under the scorer's small model; trains it as well."""

    def __init__(self, scorer: PdsScorer) -> None:
        self._scorer = scorer

    def trained(
        self, start: torch.Tensor | None, texts: list[str], steps: int, seed: int
    ) -> torch.Tensor:
        """Weights after steps of AdamW on texts, from `start` or from random weights."""
        scorer, rng = self._scorer, np.random.default_rng(seed)
        batches = scorer._drawn(texts, steps * 32, rng, "choice").split(32)
        return scorer._trained(scorer._network.parameters() if start is None else start, batches)

    @torch.no_grad()
    def of(self, theta: torch.Tensor, texts: list[str]) -> NDArray[np.float64]:
        """By text, over the same windows as PDS scores."""
        windows = [self._scorer._spread(text) for text in texts]
        rows = torch.tensor(np.concatenate(windows), dtype=torch.int64)
        values = torch.cat([self._scorer._losses(theta, batch) for batch in rows.split(64)])
        ends = np.cumsum([len(own) for own in windows])[:-1]
        return np.array([part.mean() for part in np.split(values.double().numpy(), ends)])


def main() -> None:
    """Score, choose, train, compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--num-pool", type=int, default=3000)
    parser.add_argument("--share", type=float, default=0.1, help="of the texts that is chosen")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pool, sources = read(options.data / "pool/pool-00.parquet", options.num_pool, 0)
    target, _ = read(options.data / "targets/books-train.parquet", 500, 1)
    heldout, _ = read(options.data / "targets/books-heldout.parquet", 200, 2)
    books = np.array([source == "books" for source in sources])

    started = time.perf_counter()
    scorer = PdsScorer()
    scorer.load(scorer.fit(target, pool))
    scores = {"pds": scorer.score(pool)}
    seconds = {"pds": time.perf_counter() - started}

    started, losses = time.perf_counter(), Losses(scorer)
    prior = losses.trained(None, pool, 250, 3)
    conditional = losses.trained(prior, target, TARGET_STEPS, 4)
    scores["color"] = losses.of(prior, pool) - losses.of(conditional, pool)
    seconds["color"] = time.perf_counter() - started
    scores["random"] = np.random.default_rng(5).random(len(pool))
    seconds["random"] = 0.0

    found: dict[str, Any] = {
        "texts": len(pool),
        "share of books in the pool": round(float(books.mean()), 4),
        "correlation of ranks, pds and color": rank_correlation(scores["pds"], scores["color"]),
    }
    count = int(options.share * len(pool))
    for name, values in scores.items():
        chosen = np.argsort(-values)[:count]
        texts = [pool[i] for i in chosen]
        after = [
            float(losses.of(losses.trained(None, texts, TRAIN_STEPS, seed), heldout).mean())
            for seed in range(SEEDS)
        ]
        found[name] = {
            "share of books": round(float(books[chosen].mean()), 4),
            "held-out nats a byte": round(statistics.fmean(after), 4),
            "by seed": [round(loss, 4) for loss in after],
            "seconds to score": round(seconds[name], 1),
        }
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def rank_correlation(one: NDArray[np.float64], two: NDArray[np.float64]) -> float:
    """Spearman's, without ties."""
    ranks = [np.argsort(np.argsort(values)) for values in (one, two)]
    return round(float(np.corrcoef(*ranks)[0, 1]), 3)


if __name__ == "__main__":
    main()
