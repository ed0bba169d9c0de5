import pytest
import torch

from stillhouse.mixing.decisions import quantise
from stillhouse.mixing.rewards import (
    aggregate,
    gradient_alignment,
    gradient_magnitude_similarity,
    initial_rewards,
    products,
)

ZERO = torch.zeros(4)
ONES = torch.ones(4)


def test_zero_gradients():
    rewards = (gradient_alignment, gradient_magnitude_similarity, aggregate)
    assert [reward(ZERO, ZERO) for reward in rewards] == [0, 1, 1.5]
    assert gradient_alignment(ONES, ZERO) == 0
    assert gradient_magnitude_similarity(ONES, ZERO) == pytest.approx(0, abs=1e-8)


def test_low_precision_is_accumulated_in_float32():
    ones = torch.ones(5000, dtype=torch.bfloat16)  # a bfloat16 sum of ones sticks at 256
    half = torch.cat([torch.ones(2500), torch.zeros(2500)]).bfloat16()
    assert gradient_alignment(ones, half) == pytest.approx(0.5**0.5, abs=1e-6)
    expected = 2 * 0.5**0.5 / 1.5
    assert gradient_magnitude_similarity(ones, half) == pytest.approx(expected, abs=1e-6)


def test_quantise():
    assert quantise(0.1) == 102 / 1024
    assert quantise(-0.1) == -102 / 1024
    assert quantise(1.5 / 1024) == quantise(2.5 / 1024) == 2 / 1024
    assert quantise(0.3) == quantise(0.3 + 1e-5)


def test_initial_pass_reads_one_gradient_at_a_time():
    alive = []

    def gradients():
        for arm in (ONES, -ONES, ZERO):
            alive.append(len(alive))
            yield arm

    assert initial_rewards(gradients(), ONES, gradient_alignment).tolist() == [1, -1, 0]
    assert alive == [0, 1, 2]


def test_long_gradients_are_summed_in_chunks():
    """One float32 sum over so many values is off by percents."""
    ones = torch.full((20_000_000,), 0.1)
    found = products(ones, 3 * ones)
    assert found.dot == pytest.approx(3 * 0.01 * len(ones), rel=1e-4)
    assert found.alignment() == pytest.approx(1, abs=1e-6)
    assert found.magnitude() == pytest.approx(0.6, abs=1e-6)
