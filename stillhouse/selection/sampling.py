"""Uniform samples of rows, chosen from the manifest alone.

A small sample of a large pool reads few parts: first parts are drawn, then rows of these. Every row
of the pool has the same chance. With m draws of k rows each, a part of n rows is drawn in
proportion to max(n, k), and gives k of its rows, or all if it has fewer:

    P(row) = m max(n, k) / S * min(1, k / n) = m k / S,      S = sum of max(n, k) over the parts

The draws are equally spaced over the parts in random order (systematic sampling), so that no part
is drawn twice unless it is longer than the spacing.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stillhouse.storage.artifact import PartRef

MAX_PARTS = 256
"""Of a sample, unless it would need more than a fourth of their rows."""
_LEAST_RATIO = 4


def sample_rows(
    parts: Sequence[PartRef], num_rows: int, seed: int, max_parts: int = MAX_PARTS
) -> list[tuple[int, NDArray[np.int64]]]:
    """Choose `num_rows` different rows uniformly (all of them where there are fewer).

    They are drawn from at most `max_parts` parts, or from more if the sample would take over a
    fourth of their rows. If parts differ much in size, a row or two may be missing for each part.

    Returns:
        For each part that has any: its index and its chosen rows, ascending.
    """
    sizes = np.array([part.num_rows for part in parts], np.int64)
    total = int(sizes.sum())
    generator = np.random.Generator(np.random.PCG64(seed))
    draws = max(max_parts, -(-_LEAST_RATIO * num_rows * len(parts) // max(total, 1)))
    if draws >= len(parts):
        chosen: NDArray[np.int64] = np.sort(
            generator.choice(total, min(num_rows, total), replace=False, shuffle=False)
        )
        return _by_part(chosen, sizes)
    each = _rows_a_draw(sizes, num_rows, draws)
    order = generator.permutation(len(parts))
    ends = np.cumsum(np.maximum(sizes, each)[order])
    points = (generator.random() + np.arange(draws)) * (ends[-1] / draws)
    drawn = np.bincount(order[np.searchsorted(ends, points, side="right")], minlength=len(parts))
    starts = np.cumsum(sizes) - sizes
    taken = [
        starts[i] + generator.choice(sizes[i], min(drawn[i] * each, sizes[i]), replace=False)
        for i in np.flatnonzero(drawn)
    ]
    rows = np.concatenate(taken)
    if len(rows) > num_rows:
        rows = generator.choice(rows, num_rows, replace=False)
    return _by_part(np.sort(rows), sizes)


def _rows_a_draw(sizes: NDArray[np.int64], num_rows: int, draws: int) -> int:
    """The smallest k with which the sample has `num_rows` rows on average."""
    low, high = 1, int(sizes.max())
    while low < high:
        each = (low + high) // 2
        expected = draws * each * sizes.sum() / np.maximum(sizes, each).sum()
        low, high = (each + 1, high) if expected < num_rows else (low, each)
    return low


def _by_part(
    chosen: NDArray[np.int64], sizes: NDArray[np.int64]
) -> list[tuple[int, NDArray[np.int64]]]:
    """Split ascending indices into the concatenated parts by part."""
    ends = np.cumsum(sizes)
    part_of = np.searchsorted(ends, chosen, side="right")
    starts = ends - sizes
    return [(int(part), chosen[part_of == part] - int(starts[part])) for part in np.unique(part_of)]
