"""Mean NLL of a predicted token in nats, held out and in training, over all and by source.

A packed sequence's tokens belong to the documents that own them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.selection.color import TokenLosses, piece_sums
from stillhouse.selection.quotas import MAX_SOURCES, OTHER
from stillhouse.text.pieces import Pieces
from stillhouse.training.batches import TokenSources
from stillhouse.training.group import WorkerGroup

_BLOCK = 4096  # sequences whose token losses are held at once
_MOST_SOURCES = 50_000
"""Of training losses, held at once; beyond, the smaller half becomes `OTHER`."""


@dataclass(frozen=True, slots=True)
class SourceLoss:
    """Mean NLL in nats over `num_tokens` predicted tokens."""

    nll: float
    num_tokens: int


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
    model: TokenLosses,
    input_ids: NDArray[Any],
    pieces: Pieces | None = None,
    mask: NDArray[np.float32] | None = None,
) -> tuple[float, dict[str, SourceLoss]]:
    """Held-out loss over all predicted tokens, and by source (empty without pieces).

    A predicted token belongs to the piece that owns its position. Sources without one are left out,
    the smallest are joined as by `told_apart`.

    Args:
        model: gives the losses.
        input_ids: integers [N, T], N >= 1.
        pieces: of their documents.
        mask: [N, T], 1 for tokens that count; default all.
    """
    blocks = range(0, len(input_ids), _BLOCK)
    losses = np.concatenate([model.token_nll(input_ids[i : i + _BLOCK]) for i in blocks])
    counted = np.ones_like(losses) if mask is None else mask[:, 1:]
    if mask is not None:
        losses = losses * counted
    by_source = {} if pieces is None else _by_source(losses, counted, pieces)
    total = float(losses.sum(dtype=np.float64))
    return total / max(1.0, float(counted.sum(dtype=np.float64))), by_source


def _by_source(
    losses: NDArray[np.float32], counted: NDArray[np.float32], pieces: Pieces
) -> dict[str, SourceLoss]:
    sums, counts = (
        piece_sums(values, pieces.sequence, pieces.start, pieces.end)[0].astype(np.float64)
        for values in (losses, counted)
    )
    num_sources = len(pieces.sources)
    nll = np.bincount(pieces.source, sums, num_sources)
    tokens = np.bincount(pieces.source, counts, num_sources)
    found = enumerate(pieces.sources)
    return told_apart({name: (float(nll[i]), int(tokens[i])) for i, name in found if tokens[i] > 0})


class SourceLossTally:
    """Sums over the steps since they were last taken; not part of a training's state."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}

    def add(
        self,
        token_nll: NDArray[np.float32],
        sources: TokenSources,
        mask: NDArray[np.float32] | None = None,
    ) -> None:
        """Losses of the predicted tokens of a batch: [B, T-1], column t-1 for position t.

        `mask` [B, T] marks those that count; default all.
        """
        counted = slice(None) if mask is None else mask[:, 1:].ravel() > 0
        codes = sources.codes[:, 1:].ravel()[counted]
        losses = token_nll.ravel()[counted].astype(np.float64)
        nll = np.bincount(codes, losses, len(sources.names))
        tokens = np.bincount(codes, minlength=len(sources.names))
        for i in np.flatnonzero(tokens):
            self._add(sources.names[i], float(nll[i]), int(tokens[i]))
        if len(self._sums) > 2 * _MOST_SOURCES:
            self._join_small()

    def _add(self, name: str, nll: float, tokens: int) -> None:
        before = self._sums.get(name, (0.0, 0))
        self._sums[name] = before[0] + nll, before[1] + tokens

    def _join_small(self) -> None:
        order = sorted(self._sums, key=lambda name: (-self._sums[name][1], name))
        for name in order[_MOST_SOURCES:]:
            self._add(OTHER, *self._sums.pop(name))

    def take(self, group: WorkerGroup) -> dict[str, SourceLoss]:
        """The losses of all workers' tokens by source (`told_apart`); then begin anew.

        All workers have to call this at the same step.
        """
        found = group.gather(self._sums)
        self._sums = {}
        total: dict[str, tuple[float, int]] = {}
        for sums in found:
            for name, (nll, tokens) in sums.items():
                before = total.get(name, (0.0, 0))
                total[name] = before[0] + nll, before[1] + tokens
        return told_apart(total)
