"""A selection as a torch dataset: streamed by row groups, in an order that (seed, epoch) fixes."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from stillhouse.storage.artifact import Part
from stillhouse.storage.parquet import open_part
from stillhouse.text.pieces import token_ids


class SelectionDataset(IterableDataset[dict[str, torch.Tensor]]):
    """Sequences of one rank. State is the number of rows it has given out.

    Parts are permuted by (seed, epoch) into one line of N rows; their rows already stand in a
    keyed random order. Rank r of W gives the rows [rN/W, (r+1)N/W), so that a part is read by one
    rank, but for the borders. DataLoader workers cut their rank's rows the same way; each has
    then a state of its own, as torchdata's StatefulDataLoader expects.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        rank: int,
        world_size: int,
        seed: int,
        epoch: int,
        batch_size: int | None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not below world_size {world_size}")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size {batch_size} is below 1")
        order = np.random.default_rng([seed, epoch]).permutation(len(parts))
        self._parts = [parts[i] for i in order]
        self._rank, self._batch_size = rank, batch_size
        self._order = {"seed": seed, "epoch": epoch, "world_size": world_size}
        self._given = 0
        self._resume: dict[str, int] | None = None

    def state_dict(self) -> dict[str, int]:
        """How many rows were given out, and of which order."""
        return self._order | {"rows": self._given, "workers": _workers()[1]}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration go on after those rows; parts before it are not read."""
        self._resume = dict(state)
        self._given = state["rows"]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker, workers = _workers()
        self._given = self._start(workers)
        total = sum(part.num_rows for part in self._parts)
        piece = self._rank * workers + worker
        pieces = self._order["world_size"] * workers
        first, last = total * piece // pieces, total * (piece + 1) // pieces
        blocks = self._blocks(first + self._given, last)
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
        wrong = {k: state[k] for k, v in expected.items() if state[k] != v}
        if wrong:
            raise ValueError(f"the state was taken with {wrong}, this dataset has {expected}")
        return state["rows"]

    def _blocks(self, first: int, last: int) -> Iterator[torch.Tensor]:
        """Rows [first, last) of the line, from a row group each: int64 [n, T]."""
        position = 0
        for part in self._parts:
            if first < position + part.num_rows and position < last:
                yield from _read(part.uri, first - position, last - position)
            position += part.num_rows


def _workers() -> tuple[int, int]:
    """(this DataLoader worker, their number); (0, 1) outside of one."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


def _read(uri: str, first: int, last: int) -> Iterator[torch.Tensor]:
    """Rows [first, last) of a part as far as it has them; other row groups are not read."""
    with open_part(uri) as file:
        position = 0
        for group in range(file.num_row_groups):
            num_rows = file.metadata.row_group(group).num_rows
            if first < position + num_rows and position < last:
                table = file.read_row_group(group, columns=["input_ids"], use_threads=False)
                ids: Any = token_ids(table)
                mine = ids[max(first - position, 0) : last - position]
                yield torch.from_numpy(mine.astype(np.int64))
            position += num_rows


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
