import math

import pytest

from stillhouse.training.divergence import LossGuard


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
