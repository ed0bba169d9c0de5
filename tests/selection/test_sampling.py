import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.selection.sampling import sample_rows
from stillhouse.storage.artifact import PartRef


def parts(sizes):
    return [PartRef(f"p{i}", size, 8 * size, 1, "") for i, size in enumerate(sizes)]


@given(st.lists(st.integers(0, 30), max_size=6), st.integers(0, 200), st.integers(0, 5))
def test_different_rows_that_exist(sizes, count, seed):
    found = sample_rows(parts(sizes), count, seed)
    assert sum(len(rows) for _, rows in found) == min(count, sum(sizes))
    assert [part for part, _ in found] == sorted({part for part, _ in found})
    for part, rows in found:
        assert len(rows) > 0
        assert (np.diff(rows) > 0).all()
        assert rows[0] >= 0 and rows[-1] < sizes[part]


def test_seed_decides():
    first = sample_rows(parts([1000, 1000]), 20, 0)
    again = sample_rows(parts([1000, 1000]), 20, 0)
    other = sample_rows(parts([1000, 1000]), 20, 1)
    assert [rows.tolist() for _, rows in first] == [rows.tolist() for _, rows in again]
    assert [rows.tolist() for _, rows in first] != [rows.tolist() for _, rows in other]


def test_uniform_over_parts():
    """10,000 of 100,000 rows: each tenth of them gives its tenth, within five deviations (150)."""
    found = sample_rows(parts([10_000] * 10), 10_000, 3)
    assert all(abs(len(rows) - 1000) < 150 for _, rows in found)
