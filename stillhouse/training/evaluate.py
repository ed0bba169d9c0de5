"""Held-out loss: the mean NLL of a predicted token in nats, over all and by source."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.selection.color import TokenLosses, piece_sums
from stillhouse.selection.sources import MAX_SOURCES, OTHER
from stillhouse.text.pieces import Pieces

_BLOCK = 4096  # sequences whose token losses are held at once


@dataclass(frozen=True, slots=True)
class SourceLoss:
    """Mean NLL in nats over `num_tokens` predicted tokens."""

    nll: float
    num_tokens: int


def heldout_nll(model: TokenLosses, input_ids: NDArray[Any]) -> float:
    """Mean NLL over all predicted tokens of integers [N, T], summed in float64. N >= 1."""
    total = sum(float(losses.sum(dtype=np.float64)) for losses in _blocks(model, input_ids))
    return total / (len(input_ids) * (input_ids.shape[1] - 1))


def _by_source(losses: NDArray[np.float32], pieces: Pieces) -> dict[str, SourceLoss]:
    sums, counts = piece_sums(losses, pieces.sequence, pieces.start, pieces.end)
    num_sources = len(pieces.sources)
    nll = np.bincount(pieces.source, sums.astype(np.float64), num_sources)
    tokens = np.bincount(pieces.source, counts, num_sources)
    found = enumerate(pieces.sources)
    return told_apart({name: (float(nll[i]), int(tokens[i])) for i, name in found if tokens[i] > 0})


def told_apart(sums: Mapping[str, tuple[float, int]]) -> dict[str, SourceLoss]:
    """Losses from sums of NLL and tokens by source: the largest `MAX_SOURCES`, the rest as one.

    Sorted by name; of equal size the name that comes first is the larger.
    """
    order = sorted(sums.keys() - {OTHER}, key=lambda name: (-sums[name][1], name))
    kept = {name: sums[name] for name in sorted(order[:MAX_SOURCES])}
    rest = [sums[name] for name in (*order[MAX_SOURCES:], OTHER) if name in sums]
    if rest:
        kept[OTHER] = sum(n for n, _ in rest), sum(t for _, t in rest)
    return {name: SourceLoss(nll / tokens, tokens) for name, (nll, tokens) in kept.items()}


def measure(
    model: TokenLosses, input_ids: NDArray[Any], pieces: Pieces | None
) -> tuple[float, dict[str, SourceLoss]]:
    """`heldout_nll`, and held-out loss by source (empty without pieces), from one pass.

    A predicted token belongs to the piece that owns its position. Sources without one are left out,
    the smallest are joined as by `told_apart`.
    """
    losses = np.concatenate(list(_blocks(model, input_ids)))
    by_source = {} if pieces is None else _by_source(losses, pieces)
    return float(losses.mean(dtype=np.float64)), by_source


def _blocks(model: TokenLosses, input_ids: NDArray[Any]) -> Iterator[NDArray[np.float32]]:
    for start in range(0, len(input_ids), _BLOCK):
        yield model.token_nll(input_ids[start : start + _BLOCK])
