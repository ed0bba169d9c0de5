"""Uniform samples of rows by arithmetic on the manifest: nothing is read to choose them."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stillhouse.storage.artifact import PartRef


def sample_rows(
    parts: Sequence[PartRef], num_rows: int, seed: int
) -> list[tuple[int, NDArray[np.int64]]]:
    """Choose `num_rows` different rows uniformly (all of them where there are fewer).

    Returns:
        For each part that has any: its index and its chosen rows, ascending.
    """
    ends = np.cumsum([part.num_rows for part in parts])
    total = int(ends[-1]) if len(ends) else 0
    generator = np.random.Generator(np.random.PCG64(seed))
    chosen: NDArray[np.int64] = np.sort(
        generator.choice(total, min(num_rows, total), replace=False, shuffle=False)
    )
    part_of = np.searchsorted(ends, chosen, side="right")
    starts = ends - [part.num_rows for part in parts]
    return [(int(part), chosen[part_of == part] - int(starts[part])) for part in np.unique(part_of)]
