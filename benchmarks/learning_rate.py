"""Which learning rate and batch fit a small model? Final losses, for the rule of the defaults.

    python benchmarks/learning_rate.py --data DATA --json OUT.jsonl [--stage fresh tune]

DATA holds `pool/pool-*.parquet` and `targets/books-*.parquet`. Everything is trained by the
project's own loop (`stillhouse.training.loop.train`) on sequences of 128 tokens with a vocabulary
of 2,048. One line of JSON for each training; running again does what is missing. Stages:

* fresh: models of 2 layers from scratch on 0.3 M and 1 M tokens of the pool, loss on other text of
  the pool.
* tune: the best model of width 128 on 1 M tokens, fine-tuned on books at several rates, loss on
  other books; and on the pool, which shows what it forgets.

At the end a table of all, the best of each group first.
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from stillhouse.models.causal_lm import build_model, load_model, save_model
from stillhouse.models.scoring import ScoringModel
from stillhouse.spec import ModelSettings, Optimisation
from stillhouse.text.tokenizer import Tokenizer, make_tokenizer, train_tokenizer
from stillhouse.training.evaluate import measure
from stillhouse.training.loop import Trainer
from stillhouse.training.stream import Batch

LENGTH = 128
VOCABULARY = 2048
HELDOUT_ROWS = 1024
CPU = torch.device("cpu")

FRESH: list[tuple[int, int, float, int]] = [
    (128, 300_000, 4e-3, 8),
    (128, 300_000, 8e-3, 8),
    (128, 300_000, 2e-3, 8),
    (128, 300_000, 4e-3, 32),
    (64, 300_000, 8e-3, 8),
    (64, 300_000, 4e-3, 8),
    (256, 300_000, 2e-3, 8),
    (256, 300_000, 4e-3, 8),
    (128, 300_000, 4e-3, 2),
    (64, 300_000, 16e-3, 8),
    (128, 1_000_000, 4e-3, 8),
    (128, 1_000_000, 1e-3, 32),
    (64, 1_000_000, 8e-3, 8),
    (64, 1_000_000, 8e-3, 32),
    (128, 1_000_000, 4e-3, 32),
    (128, 1_000_000, 8e-3, 8),
    (128, 1_000_000, 2e-3, 8),
    (256, 300_000, 1e-3, 8),
    (128, 1_000_000, 4e-3, 2),
    (64, 1_000_000, 16e-3, 8),
    (64, 1_000_000, 4e-3, 8),
    (256, 1_000_000, 2e-3, 8),
    (256, 1_000_000, 4e-3, 8),
    (64, 300_000, 2.8e-3, 8),
    (256, 300_000, 1.4e-3, 8),
    (64, 1_000_000, 2.8e-3, 8),
    (256, 1_000_000, 1.4e-3, 8),
]
"""Width, tokens, learning rate, sequences a step: the telling ones first."""
TUNED = [(rate, 8) for rate in (4e-4, 1e-3, 2e-3, 4e-3)] + [(2e-3, 2), (2e-3, 32)]
TUNE_TOKENS = (100_000,)
TUNE_EPOCHS = 3


@dataclass(frozen=True, slots=True)
class Training:
    """One training and what came out; losses in nats a token."""

    stage: str
    width: int
    num_tokens: int
    learning_rate: float
    batch: int
    loss: float = 0.0
    pool_loss: float | None = None
    steps: int = 0
    cpu_seconds: float = 0.0
    seconds: float = 0.0
    losses: tuple[float, ...] = ()
    """Training loss, the mean of each twentieth of the steps."""

    @property
    def key(self) -> tuple[Any, ...]:
        """What was trained, without what came out."""
        return self.stage, self.width, self.num_tokens, self.learning_rate, self.batch


@dataclass(frozen=True, slots=True)
class Text:
    """Token sequences [n, LENGTH]."""

    tokenizer: Tokenizer
    pool: NDArray[np.int64]
    pool_heldout: NDArray[np.int64]
    target: NDArray[np.int64]
    target_heldout: NDArray[np.int64]


def main() -> None:
    """Train what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--stage", nargs="+", choices=["fresh", "tune"], default=["fresh", "tune"])
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    lines = asked.json.read_text().splitlines() if asked.json.exists() else []
    done = {made.key: made for made in map(_from_json, lines)}
    text = read_text(asked.data, asked.json.with_suffix(".npz"))
    prior = asked.json.with_suffix(".prior")
    for training in planned(asked.stage):
        if training.key in done:
            continue
        made = run(training, text, prior)
        done[made.key] = made
        with asked.json.open("a") as out:
            out.write(json.dumps(asdict(made)) + "\n")
        print(line(made), flush=True)
    print("\n".join(["", *table(done.values())]))


def planned(stages: Iterable[str]) -> Iterator[Training]:
    """All trainings of the stages, in order; the tuned ones as soon as they have their prior."""
    tuned = [Training("tune", 128, n, rate, batch) for n in TUNE_TOKENS for rate, batch in TUNED]
    if "fresh" in stages:
        for number, cell in enumerate(FRESH):
            yield Training("fresh", *cell)
            if number == 10 and "tune" in stages:
                yield from tuned
    elif "tune" in stages:
        yield from tuned


def run(training: Training, text: Text, prior: Path) -> Training:
    """Train and measure. The model of width 128 that (4e-3, 8) gives on 1 M tokens is kept."""
    fresh = training.stage == "fresh"
    settings = Optimisation(learning_rate=training.learning_rate, global_batch=training.batch)
    rows = training.num_tokens // LENGTH
    if fresh:
        model = build_model(
            ModelSettings(hidden_size=training.width),
            vocab_size=text.tokenizer.vocab_size,
            sequence_length=LENGTH,
            seed=0,
            eos_id=text.tokenizer.eos_id,
        )
    else:
        model = load_model(str(prior), dtype="float32", device=CPU)
    data = (text.pool if fresh else text.target)[:rows]
    steps = max(1, round(len(data) * (1 if fresh else TUNE_EPOCHS) / training.batch))
    source = Sequences(data, training.batch)
    started, used = perf_counter(), process_time()
    trainer = Trainer(model, source, settings, device=CPU, num_steps=steps)
    losses = [trainer.step().loss for _ in range(steps)]
    seconds, cpu = perf_counter() - started, process_time() - used
    scoring = ScoringModel(model, dtype=torch.float32)
    pool_loss = measure(scoring, text.pool_heldout)[0]
    if fresh and training.key[1:] == (128, 1_000_000, 4e-3, 8):
        prior.mkdir(exist_ok=True)
        save_model(model, prior)
    means = [float(np.mean(part)) for part in np.array_split(losses, 20) if len(part)]
    return Training(
        *training.key,
        loss=pool_loss if fresh else measure(scoring, text.target_heldout)[0],
        pool_loss=None if fresh else pool_loss,
        steps=steps,
        cpu_seconds=cpu,
        seconds=seconds,
        losses=tuple(means),
    )


class Sequences:
    """Sequences [N, T] in memory; each pass in an order of its own."""

    def __init__(self, input_ids: NDArray[Any], batch_size: int) -> None:
        self._ids, self._size = input_ids, batch_size
        self._rows, self._epoch = np.zeros(0, np.int64), 0

    def next_batch(self) -> Batch:
        """The next sequences; a batch is filled from the next pass."""
        while len(self._rows) < self._size:
            rows = np.random.default_rng([0, self._epoch]).permutation(len(self._ids))
            self._rows, self._epoch = np.concatenate([self._rows, rows]), self._epoch + 1
        rows, self._rows = self._rows[: self._size], self._rows[self._size :]
        ids = torch.from_numpy(self._ids[rows].astype(np.int64))
        return Batch(ids, np.stack([np.zeros_like(rows), rows], axis=1))

    def state_dict(self) -> dict[str, Any]:
        """Not kept."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Not used."""
        raise NotImplementedError

    def close(self) -> None:
        """Nothing is read ahead."""


def read_text(data: Path, cache: Path) -> Text:
    """The first shard of the pool, books to tune on, and other text of both to measure on."""
    pool = _texts(data / "pool" / "pool-00.parquet")
    tokenizer = make_tokenizer(train_tokenizer(pool[:3000], vocab_size=VOCABULARY), None)
    if not cache.exists():
        measured, books = HELDOUT_ROWS * LENGTH, data / "targets"
        np.savez(
            cache,
            pool=_pack(tokenizer, pool, max(cell[1] for cell in FRESH)),
            pool_heldout=_pack(tokenizer, _texts(data / "pool" / "pool-01.parquet"), measured),
            target=_pack(tokenizer, _texts(books / "books-train.parquet"), max(TUNE_TOKENS)),
            target_heldout=_pack(tokenizer, _texts(books / "books-heldout.parquet"), measured),
        )
    return Text(tokenizer=tokenizer, **np.load(cache))


def _texts(path: Path) -> list[str]:
    return pq.read_table(path, columns=["text"])["text"].to_pylist()


def _pack(tokenizer: Tokenizer, texts: list[str], num_tokens: int) -> NDArray[np.int64]:
    stream: list[int] = []
    for start in range(0, len(texts), 200):
        for ids in tokenizer.encode_batch(texts[start : start + 200]):
            stream += [*ids.tolist(), tokenizer.eos_id]
        if len(stream) >= num_tokens:
            break
    whole = min(len(stream), num_tokens) // LENGTH * LENGTH
    return np.array(stream[:whole], np.int64).reshape(-1, LENGTH)


def _from_json(content: str) -> Training:
    made = json.loads(content)
    return Training(**made | {"losses": tuple(made["losses"])})


def line(made: Training) -> str:
    """One training in one line."""
    fall = made.losses[-2] - made.losses[-1] if len(made.losses) > 1 else 0.0
    pool = "" if made.pool_loss is None else f"  pool {made.pool_loss:.3f}"
    return (
        f"{made.stage:5} width {made.width:4} tokens {made.num_tokens / 1e6:4.1f} M "
        f"rate {made.learning_rate:7.4f} batch {made.batch * LENGTH:6} steps {made.steps:6} "
        f"loss {made.loss:.3f}{pool}  last fall {fall:+.3f}  {made.cpu_seconds:.0f} CPU-s"
    )


def table(done: Iterable[Training]) -> list[str]:
    """All trainings, the best of each group first."""
    ordered = sorted(done, key=lambda m: (m.stage, m.width, m.num_tokens, m.loss))
    return [line(made) for made in ordered]


if __name__ == "__main__":
    main()
