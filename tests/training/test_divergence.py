import math

import pytest

from stillhouse.training.divergence import LossGuard, late_fall


def test_a_leap_is_an_explosion_and_noise_is_not():
    guard = LossGuard()
    losses = [10 - i / 10 + (i % 3) for i in range(60)]
    assert not any(guard.exploded(loss) for loss in losses)
    mean = guard.mean
    assert mean == pytest.approx(8.00074, abs=1e-5)
    assert guard.exploded(mean + 3.1)
    assert guard.mean == mean  # it is not followed
    assert not guard.exploded(mean + 2.9)


def test_a_wild_start_is_allowed_but_nan_is_not():
    guard = LossGuard()
    assert not guard.exploded(1.0)
    assert not guard.exploded(12.0)
    assert guard.mean == 6.5
    assert guard.exploded(math.nan) and guard.exploded(math.inf)


def test_state():
    first, second = LossGuard(), LossGuard()
    for loss in [5.0, 4.0, 3.0] * 10:
        first.exploded(loss)
    second.load_state_dict(first.state_dict())
    assert [g.exploded(4.0) for g in (first, second)] == [False, False]
    assert second.state_dict() == first.state_dict()


def test_late_fall_is_the_last_tenth_against_the_one_before():
    losses = [9.0] * 32 + [5.0, 5.1, 4.9, 5.0] + [4.8, 4.7, 4.9, 4.8]  # means 5.0 and 4.8
    assert late_fall(losses) == pytest.approx(0.2)
    assert late_fall(losses[::-1]) == 0.0  # it rose


def test_late_fall_within_the_noise_is_none():
    """Means 5.0 and 4.9; variances 1/3 each over 4: a standard error of sqrt(1/6) = 0.41."""
    assert late_fall([9.0] * 32 + [4.5, 5.5, 4.5, 5.5] + [4.4, 5.4, 4.4, 5.4]) == 0.0
    assert late_fall([9.0] * 17 + [5.0, 4.0]) is None  # too few to say
