"""Held-out loss: the mean NLL of a predicted token in nats, over all and by source."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from stillhouse.selection.color import piece_sums
from stillhouse.text.pieces import Pieces

_BLOCK = 4096  # sequences whose token losses are held at once


class TokenLosses(Protocol):
    """A `ScoringModel`, or the `Trainer` of a model."""

    def token_nll(self, input_ids: NDArray[Any]) -> NDArray[np.float32]:
        """NLL in nats: integers [N, T] -> float32 [N, T-1]."""
        ...


@dataclass(frozen=True, slots=True)
class SourceLoss:
    """Mean NLL in nats over `num_tokens` predicted tokens."""

    nll: float
    num_tokens: int


def heldout_nll(model: TokenLosses, input_ids: NDArray[Any]) -> float:
    """Mean NLL over all predicted tokens of integers [N, T], summed in float64. N >= 1."""
    total = sum(float(losses.sum(dtype=np.float64)) for losses in _blocks(model, input_ids))
    return total / (len(input_ids) * (input_ids.shape[1] - 1))


def source_nll(
    model: TokenLosses, input_ids: NDArray[Any], pieces: Pieces
) -> dict[str, SourceLoss]:
    """Held-out loss by source: a predicted token belongs to the piece that owns its position.

    Sources without a predicted token are left out.
    """
    return _by_source(np.concatenate(list(_blocks(model, input_ids))), pieces)


def _by_source(losses: NDArray[np.float32], pieces: Pieces) -> dict[str, SourceLoss]:
    sums, counts = piece_sums(losses, pieces.sequence, pieces.start, pieces.end)
    num_sources = len(pieces.sources)
    nll = np.bincount(pieces.source, sums.astype(np.float64), num_sources)
    tokens = np.bincount(pieces.source, counts, num_sources)
    return {
        name: SourceLoss(float(nll[i] / tokens[i]), int(tokens[i]))
        for i, name in enumerate(pieces.sources)
        if tokens[i] > 0
    }


def measure(
    model: TokenLosses, input_ids: NDArray[Any], pieces: Pieces | None
) -> tuple[float, dict[str, SourceLoss]]:
    """`heldout_nll` and `source_nll` (empty without pieces) from one pass over the sequences."""
    losses = np.concatenate(list(_blocks(model, input_ids)))
    by_source = {} if pieces is None else _by_source(losses, pieces)
    return float(losses.mean(dtype=np.float64)), by_source


def _blocks(model: TokenLosses, input_ids: NDArray[Any]) -> Iterator[NDArray[np.float32]]:
    for start in range(0, len(input_ids), _BLOCK):
        yield model.token_nll(input_ids[start : start + _BLOCK])
