"""Mixtures that do not change, to compare the bandits with: given, by size, by alignment."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from stillhouse.mixing.policy import Law, Policy, normalise, softmax


class Static(Policy):
    """One law for the whole run, from weights of any scale: [K]."""

    def __init__(self, weights: ArrayLike) -> None:
        self._law = normalise(weights)

    def probabilities(self) -> Law:
        """The law: float64[K]."""
        return self._law.copy()

    def update(self, rewards: Mapping[int, float]) -> None:
        """Nothing is learnt."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing changes."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing changes."""


def by_size(sizes: ArrayLike, temperature: float) -> Law:
    """In proportion to sizes ** temperature: 1 as the data lie, 0 uniform: [K] -> float64[K]."""
    return softmax(temperature * np.log(np.asarray(sizes, dtype=np.float64)))


def by_alignment(alignment: ArrayLike, temperature: float) -> Law:
    """FLAD's exploit-only baseline: softmax(alignment / temperature): [K] -> float64[K].

    Alignments lie in [-1, 1], so the published temperature of 1 is nearly uniform.
    """
    return softmax(np.asarray(alignment, dtype=np.float64) / temperature)
