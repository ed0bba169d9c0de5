import pytest
import torch

from stillhouse.mixing.decisions import quantise
from stillhouse.mixing.rewards import Aim

ZERO = torch.zeros(4)
ONES = torch.ones(4)


def products(target, arm):
    return Aim.of(target).products(arm)


def test_zero_gradients():
    names = ("alignment", "magnitude", "aggregate")
    assert [products(ZERO, ZERO).reward(name) for name in names] == [0, 1, 1.5]
    assert products(ONES, ZERO).alignment() == 0
    assert products(ONES, ZERO).magnitude() == pytest.approx(0, abs=1e-8)


def test_low_precision_is_accumulated_in_float32():
    ones = torch.ones(5000, dtype=torch.bfloat16)  # a bfloat16 sum of ones sticks at 256
    half = torch.cat([torch.ones(2500), torch.zeros(2500)]).bfloat16()
    assert products(ones, half).alignment() == pytest.approx(0.5**0.5, abs=1e-6)
    expected = 2 * 0.5**0.5 / 1.5
    assert products(ones, half).magnitude() == pytest.approx(expected, abs=1e-6)


def test_quantise():
    assert quantise(0.1) == 102 / 1024
    assert quantise(-0.1) == -102 / 1024
    assert quantise(1.5 / 1024) == quantise(2.5 / 1024) == 2 / 1024
    assert quantise(0.3) == quantise(0.3 + 1e-5)


def test_long_gradients_are_summed_in_chunks():
    """One float32 sum over so many values is off by percents."""
    ones = torch.full((20_000_000,), 0.1)
    found = products(ones, 3 * ones)
    assert found.dot == pytest.approx(3 * 0.01 * len(ones), rel=1e-4)
    assert found.alignment() == pytest.approx(1, abs=1e-6)
    assert found.magnitude() == pytest.approx(0.6, abs=1e-6)
