"""Small trainings: a source of batches in memory, and tasks over parts in a folder."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from stillhouse.fingerprint import sha256
from stillhouse.spec import ModelSettings
from stillhouse.text.tokenizer import load_tokenizer
from stillhouse.training.spec import TrainingSettings
from stillhouse.training.stream import Batch
from stillhouse.training.task import TokenSet, TrainTask, with_order

MODEL = ModelSettings(hidden_size=32, num_layers=1)


class Sequences:
    """Sequences [N, T] in memory, again and again; each pass in an order of its own."""

    def __init__(self, input_ids, *, batch_size, seed=0, signals=None):
        self._ids, self._size, self._seed = input_ids, batch_size, seed
        self._signals, self._taken = signals or {}, 0

    def next_batch(self):
        rows = np.array([self._row(self._taken + i) for i in range(self._size)])
        self._taken += self._size
        ids = torch.from_numpy(self._ids[rows].astype(np.int64))
        signals = {n: torch.tensor(v[rows], dtype=torch.float32) for n, v in self._signals.items()}
        return Batch(ids, np.stack([np.zeros_like(rows), rows], axis=1), None, signals)

    def _row(self, position):
        epoch, index = divmod(position, len(self._ids))
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._ids))[index]

    def state_dict(self):
        return {"taken": self._taken}

    def load_state_dict(self, state):
        self._taken = state["taken"]

    def close(self):
        pass


def tokens_of(*uris, name="pool", **changes):
    """Parts of tokens as a training takes them."""
    tables = [pq.read_table(uri, columns=["input_ids"]) for uri in uris]
    made = TokenSet(
        name=name,
        uris=tuple(map(str, uris)),
        rows=tuple(table.num_rows for table in tables),
        digests=tuple(sha256(Path(uri).read_bytes()) for uri in uris),
        sequence_length=len(tables[0]["input_ids"][0]),
    )
    return TokenSet(**{n: getattr(made, n) for n in TokenSet.__slots__} | changes)


def train_task(data, tokenizer, num_steps, *, heldout=None, settings=None, **changes):
    """A task of a small model on some token sets; `settings` as under `train`."""
    words = load_tokenizer(str(tokenizer), None)
    learning = TrainingSettings(**{"learning_rate": 1e-2, "global_batch": 8} | (settings or {}))
    sets = data if isinstance(data, tuple) else (data,)
    content = {
        "role": "target",
        "label": "small",
        "init": MODEL,
        "data": sets,
        "heldout": heldout,
        "tokenizer": str(tokenizer),
        "tokenizer_digest": words.digest,
        "eos_token": words.eos_token,
        "vocab_size": words.vocab_size,
        "settings": with_order(learning, sets, num_steps),
        "num_steps": num_steps,
        "device": "cpu",
        "gpus": 0,
    }
    return TrainTask(**content | changes)
