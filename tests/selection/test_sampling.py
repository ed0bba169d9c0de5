import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.selection.sampling import sample_rows
from stillhouse.storage.artifact import PartRef


def parts(sizes):
    return [PartRef(f"p{i}", size, 8 * size, 1, "") for i, size in enumerate(sizes)]


def check(found, sizes):
    assert [part for part, _ in found] == sorted({part for part, _ in found})
    for part, rows in found:
        assert len(rows) > 0 and (np.diff(rows) > 0).all()
        assert rows[0] >= 0 and rows[-1] < sizes[part]


@given(st.lists(st.integers(0, 30), max_size=6), st.integers(0, 200), st.integers(0, 5))
def test_different_rows_that_exist(sizes, count, seed):
    found = sample_rows(parts(sizes), count, seed)
    assert sum(len(rows) for _, rows in found) == min(count, sum(sizes))
    check(found, sizes)


@given(
    st.lists(st.integers(0, 60), min_size=10, max_size=40),
    st.integers(1, 60),
    st.integers(2, 8),
    st.integers(0, 5),
)
def test_few_parts_are_drawn_and_never_more_rows_than_asked(sizes, count, most, seed):
    sizes[0] += 1  # a pool has rows
    found = sample_rows(parts(sizes), count, seed, most)
    check(found, sizes)
    assert sum(len(rows) for _, rows in found) <= count
    needed = -(-4 * count * len(sizes) // sum(sizes))  # to take a fourth of them at most
    assert len(found) <= max(most, needed)


def test_seed_decides():
    first = sample_rows(parts([1000, 1000]), 20, 0)
    again = sample_rows(parts([1000, 1000]), 20, 0)
    other = sample_rows(parts([1000, 1000]), 20, 1)
    assert [rows.tolist() for _, rows in first] == [rows.tolist() for _, rows in again]
    assert [rows.tolist() for _, rows in first] != [rows.tolist() for _, rows in other]


@pytest.mark.parametrize(
    "sizes",
    [[50] * 60, [*[200] * 10, *[50] * 40, *[3] * 30, *[1] * 20], [900, *[20] * 79]],
    ids=["equal", "uneven", "one large"],
)
def test_every_row_has_the_same_chance(sizes):
    """Over 1,500 seeds each row is drawn equally often: by the Poisson count of each part, within
    five deviations, and of single rows in the largest and smallest part.
    """
    seeds, count, most = 1500, 40, 12
    drawn = [np.zeros(size) for size in sizes]
    total = 0
    for seed in range(seeds):
        found = sample_rows(parts(sizes), count, seed, most)
        assert len(found) <= most
        for part, rows in found:
            drawn[part][rows] += 1
            total += len(rows)
    chance = total / seeds / sum(sizes)
    assert abs(total / seeds - count) < 0.1 * count
    for size, times in zip(sizes, drawn, strict=True):
        # a part's rows come together: its number of draws, not of rows, varies like a count
        a_draw = max(1.0, count / most)
        spread = np.sqrt(seeds * chance * size * min(a_draw, size))
        assert abs(times.sum() - seeds * chance * size) < 5 * spread
        assert (abs(times - seeds * chance) < 6 * np.sqrt(seeds * chance)).all()


def test_a_large_pool_gives_its_prior_from_few_parts():
    """1 TB: 16,000 parts of 16 M tokens in sequences of 2,048; a prior of 100 M tokens."""
    found = sample_rows(parts([7813] * 16_000), 48_828, 0)
    assert len(found) == 256
    assert sum(len(rows) for _, rows in found) == 48_828
