"""Training loss by source: a packed sequence's predicted tokens belong to their owners."""

from collections import defaultdict

import numpy as np
from numpy.typing import NDArray

from stillhouse.training.batches import TokenSources
from stillhouse.training.evaluate import SourceLoss
from stillhouse.training.group import WorkerGroup


class SourceTally:
    """Sums over the steps since they were last taken; not part of a training's state."""

    def __init__(self) -> None:
        self._nll: dict[str, float] = defaultdict(float)
        self._tokens: dict[str, int] = defaultdict(int)

    def add(self, token_nll: NDArray[np.float32], sources: TokenSources) -> None:
        """Losses of the predicted tokens of a batch: [B, T-1], column t-1 for position t."""
        codes = sources.codes[:, 1:].ravel()
        nll = np.bincount(codes, token_nll.ravel().astype(np.float64), len(sources.names))
        tokens = np.bincount(codes, minlength=len(sources.names))
        for i in np.flatnonzero(tokens):
            self._nll[sources.names[i]] += float(nll[i])
            self._tokens[sources.names[i]] += int(tokens[i])

    def take(self, group: WorkerGroup) -> dict[str, SourceLoss]:
        """The losses of all workers' tokens by source, sorted; then begin anew.

        All workers have to call this at the same step.
        """
        found = group.gather({name: (self._nll[name], n) for name, n in self._tokens.items()})
        self._nll.clear()
        self._tokens.clear()
        losses: dict[str, SourceLoss] = {}
        for name in sorted({name for sums in found for name in sums}):
            mine = [sums[name] for sums in found if name in sums]
            num_tokens = sum(tokens for _, tokens in mine)
            losses[name] = SourceLoss(sum(nll for nll, _ in mine) / num_tokens, num_tokens)
        return losses
