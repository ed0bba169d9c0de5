"""A selection as a torch dataset: streamed by row groups, in an order that (seed, epoch) fixes."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch.utils.data import IterableDataset

from stillhouse.storage.filesystem import open_read
from stillhouse.text.pieces import token_ids

if TYPE_CHECKING:
    from stillhouse.storage.readers import Selection


class SelectionDataset(IterableDataset[dict[str, torch.Tensor]]):
    """Sequences of one rank. State is the number of rows it has given out.

    Parts are permuted by (seed, epoch); their rows already stand in a keyed random order. Row i
    of this order goes to rank `i % world_size`.
    """

    def __init__(
        self,
        selection: "Selection",
        rank: int,
        world_size: int,
        seed: int,
        epoch: int,
        batch_size: int | None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not below world_size {world_size}")
        self._parts = selection.parts
        self._rank, self._world_size = rank, world_size
        self._order = np.random.default_rng([seed, epoch]).permutation(len(self._parts))
        self._batch_size = batch_size
        self._given = 0

    def state_dict(self) -> dict[str, int]:
        """How many rows of this rank were given out."""
        return {"rows": self._given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after that many rows; whole parts are skipped without being read."""
        self._given = state["rows"]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        if self._batch_size is None:
            for block in self._blocks():
                for row in block:
                    self._given += 1
                    yield {"input_ids": row}
            return
        waiting: list[torch.Tensor] = []
        size = 0
        for block in self._blocks():
            waiting.append(block)
            size += len(block)
            if size < self._batch_size:
                continue
            rows = torch.cat(waiting)
            whole = size - size % self._batch_size
            for batch in rows[:whole].split(self._batch_size):
                self._given += len(batch)
                yield {"input_ids": batch}
            waiting, size = [rows[whole:]], size - whole
        if size:
            self._given += size
            yield {"input_ids": torch.cat(waiting)}

    def _blocks(self) -> Iterator[torch.Tensor]:
        """This rank's rows after those given out, a row group at a time: int64 [n, T]."""
        skip = self._given * self._world_size + self._rank
        position = 0
        for index in self._order:
            part = self._parts[index]
            if position + part.num_rows <= skip:
                position += part.num_rows
                continue
            for ids in self._groups(part.uri):
                first = skip - position
                if first < len(ids):
                    mine = ids[first :: self._world_size]
                    skip += len(mine) * self._world_size
                    yield torch.from_numpy(mine.astype(np.int64))
                position += len(ids)

    def _groups(self, uri: str) -> Iterator[Any]:
        with open_read(uri) as stream:
            file = pq.ParquetFile(stream)
            for group in range(file.num_row_groups):
                yield token_ids(file.read_row_group(group, columns=["input_ids"]))
