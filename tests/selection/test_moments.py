"""Moments against numpy's two-pass ones over all values at once."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.selection.moments import Moments, PairMoments, moments_by_code

values = st.floats(-100, 100, width=32)
blocks = st.lists(st.lists(st.tuples(values, values), max_size=6), min_size=1, max_size=6)


@given(blocks, st.sampled_from([0.0, 1e7]))
def test_blocks_add_up_to_the_whole(found, offset):
    """An offset of 1e7 leaves sums of squares two digits; deviations keep nine."""
    arrays = [np.array(block, np.float64).reshape(-1, 2) + offset for block in found]
    total = PairMoments()
    for block in arrays:
        total.add(PairMoments.of(block[:, 0], block[:, 1]))
    x, y = np.concatenate(arrays).T
    assert total.x.count == total.y.count == len(x)
    if not len(x):
        assert total == PairMoments() and total.x.std == total.correlation == 0
        return
    assert total.y.mean == pytest.approx(np.mean(y), abs=1e-6)
    assert total.y.std == pytest.approx(np.std(y), abs=1e-6)
    deviations = (x - np.mean(x)) * (y - np.mean(y))
    assert total.products == pytest.approx(np.sum(deviations), abs=1e-3)


def test_correlation():
    rng = np.random.default_rng(0)
    x = rng.normal(size=500)
    y = 3 - 2 * x + rng.normal(size=500)
    total = PairMoments()
    for part in np.array_split(np.arange(500), 7):
        total.add(PairMoments.of(x[part], y[part]))
    assert total.correlation == pytest.approx(np.corrcoef(x, y)[0, 1], rel=1e-12)
    assert PairMoments.of(np.ones(5), rng.normal(size=5)).correlation == 0.0


def test_moments_by_code():
    codes = np.array([2, 0, 2, 2, 0], np.int32)
    found = moments_by_code(codes, np.array([1.0, 5.0, 2.0, 6.0, 7.0]), 4)
    assert found == [Moments(2, 6.0, 2.0), Moments(), Moments(3, 3.0, 14.0), Moments()]
