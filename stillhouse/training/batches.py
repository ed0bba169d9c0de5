"""Where training batches come from: a small protocol, and sequences that are held in memory."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenSources:
    """Whose the tokens of a batch are: `codes` int32 [B, T] are indices into `names`."""

    codes: NDArray[np.int32]
    names: tuple[str, ...]

    def present(self) -> list[str]:
        """The sources that own a token, sorted."""
        return sorted(self.names[i] for i in np.unique(self.codes))


@dataclass(frozen=True, slots=True)
class Batch:
    """One global batch, or a worker's share of it.

    Attributes:
        input_ids: int64 [B, T], on the CPU.
        samples: int64 [B, 2], part and row of each sequence.
        sources: of every token, where they are known.
    """

    input_ids: Tensor
    samples: NDArray[np.int64]
    sources: TokenSources | None = None


class BatchSource(Protocol):
    """An endless, ordered stream of global batches (a worker's rows of them) that can be
    continued anywhere.
    """

    def next_batch(self) -> Batch:
        """The next batch; always of the same shape."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as plain JSON values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        ...


class TokenBatches:
    """Sequences [N, T] in memory; each epoch in an order of its own, fixed by (seed, epoch).

    A batch that reaches the end of an epoch is filled from the next. State is the number of
    sequences given out.

    Raises:
        ValueError: no sequences.
    """

    def __init__(
        self,
        input_ids: NDArray[Any],
        *,
        batch_size: int,
        seed: int,
        samples: NDArray[np.int64] | None = None,
    ) -> None:
        """`samples`: int64 [N, 2], part and row of each sequence; default (0, position)."""
        if not len(input_ids):
            raise ValueError("no sequences to train on")
        self._input_ids = input_ids
        self._batch_size = batch_size
        self._seed = seed
        self._samples = samples
        self._consumed = 0
        self._epoch = -1
        self._order: NDArray[np.int64] = np.empty(0, np.int64)

    def next_batch(self) -> Batch:
        """The next `batch_size` sequences."""
        taken: list[NDArray[np.int64]] = []
        wanted = self._batch_size
        while wanted:
            epoch, position = divmod(self._consumed, len(self._input_ids))
            rows = self._order_of(epoch)[position : position + wanted]
            taken.append(rows)
            wanted -= len(rows)
            self._consumed += len(rows)
        rows = np.concatenate(taken)
        if self._samples is not None:
            samples = self._samples[rows]
        else:
            samples = np.stack([np.zeros_like(rows), rows], axis=1)
        return Batch(torch.from_numpy(self._input_ids[rows].astype(np.int64)), samples)

    def state_dict(self) -> dict[str, int]:
        """How many sequences were given out."""
        return {"consumed": self._consumed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after that many sequences."""
        self._consumed = int(state["consumed"])

    def _order_of(self, epoch: int) -> NDArray[np.int64]:
        if epoch != self._epoch:
            rng = np.random.default_rng([self._seed, epoch])
            self._order, self._epoch = rng.permutation(len(self._input_ids)), epoch
        return self._order
