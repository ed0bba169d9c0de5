"""Means and variances that add up over parts: exact to float64's rounding, in any order of parts.

Sums of squares would cancel where scores vary little around a large mean (a custom scorer's may);
deviations from the mean do not (Chan, Golub, LeVeque, 1983).
"""

from dataclasses import dataclass, field
from math import sqrt

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(slots=True)
class Moments:
    """Count, mean, and sum of squared deviations from the mean, of any number of values."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, values: Floats) -> "Moments":
        """Those of values [n], all finite."""
        if not len(values):
            return cls()
        mean = float(values.mean())
        return cls(len(values), mean, float(((values - mean) ** 2).sum()))

    def add(self, other: "Moments") -> None:
        """Add the values that `other` stands for."""
        count = self.count + other.count
        if not other.count:
            return
        gap, share = other.mean - self.mean, other.count / count
        self.squares += other.squares + gap**2 * self.count * share
        self.mean += gap * share
        self.count = count

    @property
    def std(self) -> float:
        """The standard deviation of the values themselves; 0 without any."""
        return sqrt(self.squares / self.count) if self.count else 0.0


@dataclass(slots=True)
class PairMoments:
    """Those of pairs (x, y), and the sum of the products of their deviations."""

    x: Moments = field(default_factory=Moments)
    y: Moments = field(default_factory=Moments)
    products: float = 0.0

    @classmethod
    def of(cls, x: Floats, y: Floats) -> "PairMoments":
        """Those of pairs [n], all finite."""
        found = cls(Moments.of(x), Moments.of(y))
        found.products = float(((x - found.x.mean) * (y - found.y.mean)).sum())
        return found

    def add(self, other: "PairMoments") -> None:
        """Add the pairs that `other` stands for."""
        if other.x.count:
            share = other.x.count / (self.x.count + other.x.count)
            gaps = (other.x.mean - self.x.mean) * (other.y.mean - self.y.mean)
            self.products += other.products + gaps * self.x.count * share
        self.x.add(other.x)
        self.y.add(other.y)

    @property
    def correlation(self) -> float:
        """Pearson's; 0 where one side is constant."""
        spread = sqrt(self.x.squares) * sqrt(self.y.squares)
        return self.products / spread if spread > 0 else 0.0


def moments_by_code(codes: NDArray[np.int32], values: Floats, num_codes: int) -> list[Moments]:
    """The moments of the values of each code in [0, num_codes)."""
    counts = np.bincount(codes, minlength=num_codes)
    means = np.bincount(codes, values, num_codes) / np.maximum(counts, 1)
    squares = np.bincount(codes, (values - means[codes]) ** 2, num_codes)
    return [
        Moments(int(n), float(m), float(s)) for n, m, s in zip(counts, means, squares, strict=True)
    ]
