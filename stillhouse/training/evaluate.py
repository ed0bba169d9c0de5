"""Mean NLL of a predicted token in nats, held out and in training, in total and by source.

In a packed sequence, a token's source is that of the document that owns its position.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.selection.color import TokenLosses, piece_sums
from stillhouse.selection.quotas import MAX_SOURCES, OTHER
from stillhouse.text.pieces import Pieces
from stillhouse.training.group import WorkerGroup
from stillhouse.training.stream import TokenSources

_BLOCK = 4096  # sequences whose token losses are held at once
_MOST_SOURCES = 50_000  # tracked during training; beyond, the smaller half becomes `OTHER`


@dataclass(frozen=True, slots=True)
class SourceLoss:
    """Mean NLL in nats over `num_tokens` predicted tokens."""

    nll: float
    num_tokens: int


def largest_sources(sums: Mapping[str, tuple[float, int]]) -> dict[str, SourceLoss]:
    """Losses from sums of NLL and tokens by source: the `MAX_SOURCES` largest, the rest as `OTHER`.

    Sorted by name; of equally large ones those that come first by name are kept.
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
    """Mean loss over all predicted tokens, and by source (empty without `pieces`).

    Args:
        input_ids: integers [N, T], N >= 1.
        pieces: the documents in them.
        mask: [N, T], 1 for tokens that count; default all.
    """
    blocks = range(0, len(input_ids), _BLOCK)
    losses = np.concatenate([model.token_nll(input_ids[i : i + _BLOCK]) for i in blocks])
    counted = np.ones_like(losses) if mask is None else mask[:, 1:]
    if mask is not None:
        losses = losses * counted
    by_source: dict[str, SourceLoss] = {}
    if pieces is not None:
        nll, tokens = (
            np.bincount(
                pieces.source,
                piece_sums(values, pieces.sequence, pieces.start, pieces.end)[0].astype(np.float64),
                len(pieces.sources),
            )
            for values in (losses, counted)
        )
        totals = zip(pieces.sources, nll.tolist(), tokens.tolist(), strict=True)
        by_source = largest_sources({name: (n, int(t)) for name, n, t in totals if t > 0})
    total = float(losses.sum(dtype=np.float64))
    return total / max(1.0, float(counted.sum(dtype=np.float64))), by_source


class SourceLossTally:
    """Training losses by source since the last `take`; not part of a training's state."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}

    def add(
        self,
        token_nll: NDArray[np.float32],
        sources: TokenSources,
        mask: NDArray[np.float32] | None = None,
    ) -> None:
        """Add the losses [B, T-1] of a batch's predicted tokens; column t-1 is position t.

        `mask` [B, T] marks those that count; default all.
        """
        counted = slice(None) if mask is None else mask[:, 1:].ravel() > 0
        codes = sources.codes[:, 1:].ravel()[counted]
        losses = token_nll.ravel()[counted].astype(np.float64)
        nll = np.bincount(codes, losses, len(sources.names))
        tokens = np.bincount(codes, minlength=len(sources.names))
        used = np.flatnonzero(tokens).tolist()
        _add(self._sums, ((sources.names[i], (float(nll[i]), int(tokens[i]))) for i in used))
        if len(self._sums) > 2 * _MOST_SOURCES:
            order = sorted(self._sums, key=lambda name: (-self._sums[name][1], name))
            small = [(OTHER, self._sums.pop(name)) for name in order[_MOST_SOURCES:]]
            _add(self._sums, small)

    def take(self, group: WorkerGroup) -> dict[str, SourceLoss]:
        """The losses of all workers' tokens (`largest_sources`), and reset; all workers call it."""
        gathered = group.gather(self._sums)
        self._sums = {}
        total: dict[str, tuple[float, int]] = {}
        for sums in gathered:
            _add(total, sums.items())
        return largest_sources(total)


def _add(sums: dict[str, tuple[float, int]], more: Iterable[tuple[str, tuple[float, int]]]) -> None:
    for name, (nll, tokens) in more:
        before = sums.get(name, (0.0, 0))
        sums[name] = before[0] + nll, before[1] + tokens
