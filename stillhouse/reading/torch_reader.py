"""A selection as a torch dataset: streamed by row groups, in an order that (seed, epoch) fixes."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from stillhouse.storage.artifact import Part
from stillhouse.storage.parquet import open_part
from stillhouse.text.pieces import token_ids

_ORDER_VERSION = 2
"""1 had the rows of a part in their own order, and workers that shared rows instead of batches."""


class SelectionDataset(IterableDataset[dict[str, torch.Tensor]]):
    """Sequences of one rank. Its state is the number of rows that it has returned.

    Parts, their row groups and the rows of these are permuted by (seed, epoch), which puts all N
    rows in an order. Rank r of W has the rows from rN/W to (r+1)N/W, or with `drop_last` as many
    whole batches as every rank has. So a part is read by one rank, except at the borders.
    DataLoader workers share the batches of their rank in the same way; each has its own state, as
    torchdata's StatefulDataLoader expects.

    Attributes:
        dropped_rows: of all N, the rows that no rank returns; 0 without `drop_last`.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        rank: int,
        world_size: int,
        seed: int,
        epoch: int,
        batch_size: int | None,
        drop_last: bool = False,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not below world_size {world_size}")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size {batch_size} is below 1")
        order = np.random.default_rng([seed, epoch]).permutation(len(parts))
        self._parts = [(int(i), parts[i]) for i in order]
        self._batch_size, self._size = batch_size, batch_size or 1
        total = sum(part.num_rows for part in parts)
        self._first, self._last = total * rank // world_size, total * (rank + 1) // world_size
        self._items = -(-(self._last - self._first) // self._size)
        self.dropped_rows = 0
        if drop_last:
            self._items = total // world_size // self._size
            self._last = self._first + self._items * self._size
            self.dropped_rows = total - world_size * self._items * self._size
        self._order: dict[str, Any] = {
            "version": _ORDER_VERSION,
            "seed": seed,
            "epoch": epoch,
            "world_size": world_size,
            "batch_size": batch_size,
            "drop_last": drop_last,
        }
        self._given = 0
        self._resume: dict[str, Any] | None = None

    def __len__(self) -> int:
        """Batches (rows without `batch_size`) of this rank, over all DataLoader workers."""
        return self._items

    def state_dict(self) -> dict[str, Any]:
        """The number of rows returned, and the order."""
        return self._order | {"rows": self._given, "workers": _workers()[1]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the next iteration after those rows; parts before them are not read."""
        self._resume = dict(state)
        self._given = state["rows"]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker, workers = _workers()
        self._given = self._start(workers)
        first, end = (self._items * w // max(workers, 1) for w in (worker, worker + 1))
        last = min(self._first + end * self._size, self._last)
        blocks = self._blocks(self._first + first * self._size + self._given, last)
        if self._batch_size is None:
            for row in (row for block in blocks for row in block):
                self._given += 1
                yield {"input_ids": row}
        else:
            for batch in _batches(blocks, self._batch_size):
                self._given += len(batch)
                yield {"input_ids": batch}

    def _start(self, workers: int) -> int:
        state, self._resume = self._resume, None
        if state is None:
            return 0
        expected = self._order | {"workers": workers}
        wrong = {k: state.get(k) for k, v in expected.items() if state.get(k) != v}
        if wrong:
            hint = (
                "; DataLoader's workers count their rows themselves, so that a state taken outside "
                "of them is of no use: take and load the state of torchdata's StatefulDataLoader"
                if "workers" in wrong
                else ""
            )
            raise ValueError(f"the state was taken with {wrong}, this dataset has {expected}{hint}")
        return int(state["rows"])

    def _blocks(self, first: int, last: int) -> Iterator[torch.Tensor]:
        """Rows [first, last) of the order, those of a row group at a time: int64 [n, T]."""
        position = 0
        for index, part in self._parts:
            if first < position + part.num_rows and position < last:
                yield from self._read(index, part.uri, first - position, last - position)
            position += part.num_rows

    def _read(self, index: int, uri: str, first: int, last: int) -> Iterator[torch.Tensor]:
        """Those of rows [first, last) of the part's order that exist; reads only their groups."""
        key = [self._order["seed"], self._order["epoch"], 1 + index]
        with open_part(uri) as file:
            position = 0
            for group in np.random.default_rng(key).permutation(file.num_row_groups).tolist():
                num_rows = file.metadata.row_group(group).num_rows
                if first < position + num_rows and position < last:
                    table = file.read_row_group(group, columns=["input_ids"], use_threads=False)
                    rows = np.random.default_rng([*key, 1 + group]).permutation(num_rows)
                    ids: Any = token_ids(table)
                    mine = ids[rows[max(first - position, 0) : last - position]]
                    yield torch.from_numpy(mine.astype(np.int64))
                position += num_rows


def _workers() -> tuple[int, int]:
    """(this DataLoader worker, their number); (0, 0) outside of one."""
    info = get_worker_info()
    return (0, 0) if info is None else (info.id, info.num_workers)


def _batches(blocks: Iterator[torch.Tensor], size: int) -> Iterator[torch.Tensor]:
    """The same rows, `size` at a time; the last batch may be smaller."""
    rest: torch.Tensor | None = None
    for block in blocks:
        rows = block if rest is None else torch.cat([rest, block])
        whole = len(rows) - len(rows) % size
        for start in range(0, whole, size):
            yield rows[start : start + size]
        rest = rows[whole:]
    if rest is not None and len(rest):
        yield rest
