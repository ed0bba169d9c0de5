"""Mixture weights from proxy runs, on metrics whose best mixture is known."""

import numpy as np
import pytest

from stillhouse.errors import SpecError
from stillhouse.mixing.proxies import (
    LEAST_SHARE,
    draw_mixtures,
    fit_mixture,
    natural_shares,
    share_limits,
    within,
)

NATURAL = natural_shares([60, 30, 10])
FREE = np.ones(3)


def fitted(metrics_of, limits=FREE, regression="ridge", smallest=True, count=32):
    rng = np.random.default_rng(0)
    mixtures = draw_mixtures(NATURAL, count, 6.0, rng)
    return fit_mixture(
        mixtures,
        np.array([metrics_of(one) for one in mixtures]),
        NATURAL,
        limits,
        regression=regression,
        concentration=6.0,
        smallest=smallest,
        seed=0,
    )


def test_natural_shares_and_draws():
    assert NATURAL.tolist() == [0.6, 0.3, 0.1]
    drawn = draw_mixtures(NATURAL, 20_000, 6.0, np.random.default_rng(1))
    assert drawn.sum(axis=1) == pytest.approx(1) and drawn.min() >= LEAST_SHARE
    assert drawn.mean(axis=0) == pytest.approx(NATURAL, abs=0.01)
    # the variance of a Dirichlet share: p (1 - p) / (concentration + 1)
    assert drawn.var(axis=0) == pytest.approx(NATURAL * (1 - NATURAL) / 7, rel=0.05)


def test_shares_are_cut_at_limits():
    """(.8, .15, .05) cut at .5 leaves .3, split by the rooms .35 and .15 under (.5, .5, .2)."""
    mixture, high = np.array([[0.8, 0.15, 0.05]]), np.array([0.5, 0.5, 0.2])
    found = within(mixture, np.zeros(3), high)[0]
    assert found == pytest.approx([0.5, 0.15 + 0.3 * 0.7, 0.05 + 0.3 * 0.3])
    low = np.array([0.0, 0.3, 0.2])
    assert within(mixture, low, FREE)[0] == pytest.approx([0.5, 0.3, 0.2])


def test_the_optimum_of_a_parabola():
    """(w1 - .4)^2 + (w3 - .25)^2 is least at (.4, .35, .25), where it is 0."""
    found = fitted(lambda w: (w[0] - 0.4) ** 2 + (w[2] - 0.25) ** 2)
    assert found.shares == pytest.approx([0.4, 0.35, 0.25], abs=0.02)
    assert found.predicted == pytest.approx(0, abs=1e-3)
    assert found.rank_correlation > 0.99
    most = fitted(lambda w: 3 - (w[0] - 0.4) ** 2 - (w[2] - 0.25) ** 2, smallest=False)
    assert most.shares == pytest.approx([0.4, 0.35, 0.25], abs=0.02)


def test_the_optimum_under_limits():
    """Seen at most 4 times in 1,600 tokens: 60, 30 and 10 tokens have .15, .075 and .025 of it, too
    little; in 200 tokens all of it, .6 and .2. There the parabola is least at w3 = .2 and w1 = .4
    (its two terms are independent, w2 = .4 is allowed)."""
    with pytest.raises(SpecError, match=r"4 epochs of all data are 400 tokens, the training has"):
        share_limits([60, 30, 10], 1600, 4)
    limits = share_limits([60, 30, 10], 200, 4)
    assert limits.tolist() == [1.0, 0.6, 0.2]
    found = fitted(lambda w: (w[0] - 0.4) ** 2 + (w[2] - 0.25) ** 2, limits)
    assert found.shares == pytest.approx([0.4, 0.4, 0.2], abs=0.02)
    assert np.all(np.array(found.shares) <= limits + 1e-9)


def test_trees_find_the_better_source():
    found = fitted(lambda w: 5 - np.log(w[2] + 0.1), regression="boosted")
    assert found.shares[2] > 2 * NATURAL[2]
    assert found.rank_correlation > 0.9


def test_noise_has_no_rank_correlation():
    """It is below 0: what is left out pulls the mean of the others the other way."""
    rng = np.random.default_rng(5)
    found = fitted(lambda w: float(rng.normal()))
    assert found.rank_correlation < 0.3
    assert fitted(lambda w: 1.0).rank_correlation is None
