"""Mixture weights from small proxy runs, as RegMix finds them (Liu et al. 2024, arXiv 2407.01492).

Small models are trained on mixtures drawn from a Dirichlet distribution around the natural one,
which has each data set's share of all tokens. A regression predicts the metric from the shares.
The weights are the mean of the mixtures with the best predictions among many, which lie where the
proxies lay and repeat no data set too often in the training that they are for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from stillhouse.errors import SpecError

LEAST_SHARE = 1e-3
"""Of a data set in a proxy run: a weight of 0 would be another job."""
_NUM_CANDIDATES, _NUM_BEST = 100_000, 100
_FOLDS = 8
_PENALTIES = np.logspace(-6, 2, 17)


@dataclass(frozen=True, slots=True)
class Fit:
    """What the regression found.

    Attributes:
        shares: of each data set in the best mixture, [K], sum 1.
        predicted: the metric there.
        crossed: of each proxy run the metric that the others predict, [N].
        rank_correlation: Spearman's, of `crossed` and what was measured; None where all are equal.
    """

    shares: list[float]
    predicted: float
    crossed: list[float]
    rank_correlation: float | None


def natural_shares(num_tokens: Sequence[float]) -> NDArray[np.float64]:
    """Each data set's share of all tokens, [K]."""
    tokens = np.asarray(num_tokens, np.float64)
    return tokens / tokens.sum()


def draw_mixtures(
    natural: NDArray[np.float64], count: int, concentration: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Mixtures [N, K] from Dirichlet(concentration x natural), no share below `LEAST_SHARE`."""
    drawn = rng.dirichlet(concentration * natural, count)
    return within(drawn, np.full(natural.size, LEAST_SHARE), np.ones(natural.size))


def within(
    mixtures: NDArray[np.float64], low: NDArray[np.float64], high: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Mixtures [N, K] with all shares between two limits [K]: shares are cut off at them, and what
    is missing or left over is split in proportion to the room that the data sets have.

    The lower limits have a sum of at most 1, the upper ones of at least 1.
    """
    cut = np.clip(mixtures, low, high)
    rest = 1 - cut.sum(axis=1, keepdims=True)
    room = np.where(rest > 0, high - cut, cut - low)
    total = room.sum(axis=1, keepdims=True)
    return cut + rest * np.divide(room, total, out=np.zeros_like(room), where=total > 0)


def share_limits(
    num_tokens: Sequence[float], training_tokens: float, max_epochs: float
) -> NDArray[np.float64]:
    """The largest share [K] of each data set that a training sees `max_epochs` times at most.

    Raises:
        SpecError: all data sets together are too small for the training.
    """
    tokens = np.asarray(num_tokens, np.float64)
    limits = np.minimum(1.0, max_epochs * tokens / training_tokens)
    if limits.sum() < 1:
        raise SpecError(
            f"`sweep.mixture`: {max_epochs:g} epochs of all data are "
            f"{max_epochs * tokens.sum():.4g} tokens, the training has {training_tokens:.4g}: "
            "raise `max_epochs` or lower `num_tokens`"
        )
    return limits


def fit_mixture(
    mixtures: NDArray[np.float64],
    metrics: NDArray[np.float64],
    natural: NDArray[np.float64],
    limits: NDArray[np.float64],
    *,
    regression: Literal["ridge", "boosted"],
    concentration: float,
    smallest: bool,
    seed: int,
) -> Fit:
    """The best mixture by a regression of the metric on the shares.

    Args:
        mixtures: of the proxy runs, [N, K].
        metrics: of the proxy runs, [N].
        natural: [K].
        limits: the largest share of each data set, [K].
        regression: ridge: on shares and their products, with a penalty chosen by leaving one out;
            boosted: gradient-boosted trees.
        concentration: of the candidates' distribution.
        smallest: whether the smallest metric is the best.
        seed: of candidates, folds and trees.
    """
    from scipy.stats import spearmanr
    from sklearn.model_selection import KFold, cross_val_predict

    rng = np.random.default_rng(seed)
    folds = KFold(min(_FOLDS, len(metrics)), shuffle=True, random_state=seed)
    model = _model(regression, seed)
    crossed = np.asarray(cross_val_predict(model, mixtures, metrics, cv=folds), np.float64)
    varied = np.ptp(crossed) > 0 and np.ptp(metrics) > 0
    ranks: Any = spearmanr(crossed, metrics) if varied else None
    correlation = None if ranks is None else float(ranks.statistic)
    high = np.minimum(limits, mixtures.max(axis=0))
    if high.sum() < 1:  # the limits exclude what the proxies had most of
        high = limits
    low = np.minimum(mixtures.min(axis=0), high)
    candidates = within(rng.dirichlet(concentration * natural, _NUM_CANDIDATES), low, high)
    model = model.fit(mixtures, metrics)
    predicted = model.predict(candidates) * (1 if smallest else -1)
    best = candidates[np.argsort(predicted, kind="stable")[:_NUM_BEST]].mean(axis=0)
    at_best = float(model.predict(best[None])[0])
    return Fit(best.tolist(), at_best, crossed.tolist(), correlation)


def _model(regression: Literal["ridge", "boosted"], seed: int) -> Any:
    from sklearn.ensemble import GradientBoostingRegressor
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import PolynomialFeatures, StandardScaler

    if regression == "boosted":
        return GradientBoostingRegressor(
            n_estimators=200, learning_rate=0.05, max_depth=2, subsample=0.8, random_state=seed
        )
    products = PolynomialFeatures(2, include_bias=False)
    return make_pipeline(products, StandardScaler(), RidgeCV(_PENALTIES))
