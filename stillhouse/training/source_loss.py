"""Training loss by source: a packed sequence's predicted tokens belong to their owners."""

import numpy as np
from numpy.typing import NDArray

from stillhouse.selection.sources import OTHER
from stillhouse.training.batches import TokenSources
from stillhouse.training.evaluate import SourceLoss, told_apart
from stillhouse.training.group import WorkerGroup

_MOST_SOURCES = 50_000
"""Held at once; beyond, the smaller half becomes `OTHER`."""


class SourceLossTally:
    """Sums over the steps since they were last taken; not part of a training's state."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, token_nll: NDArray[np.float32], sources: TokenSources) -> None:
        """Losses of the predicted tokens of a batch: [B, T-1], column t-1 for position t."""
        codes = sources.codes[:, 1:].ravel()
        nll = np.bincount(codes, token_nll.ravel().astype(np.float64), len(sources.names))
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
