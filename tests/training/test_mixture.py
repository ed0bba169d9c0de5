import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.errors import SpecError
from stillhouse.training.mixture import Mixture


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=5), st.integers(1, 3000))
def test_shares_hold_at_any_time(weights, draws):
    mixture = Mixture(weights, seed=1)
    datasets, positions = mixture.draws(2, 0, draws)
    done = draws - draws % 256
    for i, weight in enumerate(weights):
        mine = np.flatnonzero(datasets == i)
        assert mixture.num_drawn(i, 2, draws) == len(mine)
        assert positions[mine].tolist() == list(range(len(mine)))
        assert [mixture.draw_of(i, 2, n) for n in range(len(mine))[::50]] == mine[::50].tolist()
        assert abs((mine < done).sum() - done * weight / sum(weights)) < 2


def test_a_small_weight_beside_two_large_ones_never_gives_a_draw_back():
    mixture = Mixture([4.0, 0.01171875, 9.75], seed=1)
    datasets, _ = mixture.draws(0, 0, 256 * 400)
    counts = np.bincount(datasets, minlength=3)
    assert counts.sum() == 256 * 400
    exact = 256 * 400 * np.array([4.0, 0.01171875, 9.75]) / 13.76171875
    assert np.abs(counts - exact).max() <= 1


def test_draws_can_be_asked_for_anywhere():
    mixture = Mixture([0.5, 0.2, 0.3], seed=0)
    datasets, positions = mixture.draws(1, 0, 2000)
    for first, count in [(0, 1), (255, 2), (250, 700), (1999, 1)]:
        found = mixture.draws(1, first, count)
        assert found[0].tolist() == datasets[first : first + count].tolist()
        assert found[1].tolist() == positions[first : first + count].tolist()


def test_one_data_set_is_drawn_from_in_order():
    mixture = Mixture([3.0], seed=0)
    assert [part.tolist() for part in mixture.draws(0, 7, 3)] == [[0, 0, 0], [7, 8, 9]]
    assert mixture.num_drawn(0, 0, 9) == mixture.draw_of(0, 0, 9) == 9


def test_lanes_and_seeds_differ():
    first = Mixture([1, 1], 0).draws(0, 0, 60)[0].tolist()
    assert first != Mixture([1, 1], 0).draws(1, 0, 60)[0].tolist()
    assert first != Mixture([1, 1], 1).draws(0, 0, 60)[0].tolist()


def test_weights_are_positive():
    with pytest.raises(SpecError, match=r"weights of data sets must be positive, not \[1, 0\]"):
        Mixture([1, 0], 0)
