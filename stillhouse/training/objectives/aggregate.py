"""Learning from aggregate responses (Javanmard et al. 2024, arXiv 2401.11081).

Only the mean response of each bag of k samples is known.

    bag       L_bag = mean over bags of l(y_bag, mean prediction)              unbiased
    instance  L_ins = mean over samples of l(y_bag, own prediction)            low variance
    between   L_rho = (1 - rho) L_bag + rho L_ins

For the squared loss L_ins - L_bag is the mean variance of the predictions in a bag, so rho
regularises. With classes the losses are cross-entropies of the mean probability, not of the mean
logit. A bag must lie in one micro-batch of one worker.
"""

import math

from torch import Tensor

from stillhouse.training.objectives.distil import promoted


def squared(predictions: Tensor, means: Tensor, rho: float) -> Tensor:
    """L_rho, a scalar, of predictions [m, k] and the bags' mean responses [m]."""
    predictions = promoted(predictions)
    bag = (means - predictions.mean(1)).square().mean()
    return (1 - rho) * bag + rho * (means[:, None] - predictions).square().mean()


def cross_entropy(log_probs: Tensor, shares: Tensor, rho: float) -> Tensor:
    """L_rho, a scalar, of log-probabilities [m, k, C] and the bags' class shares [m, C]."""
    log_probs, size = promoted(log_probs), log_probs.shape[1]
    bag = -(shares * (log_probs.logsumexp(1) - math.log(size))).sum(1).mean()
    return (1 - rho) * bag - rho * (shares[:, None] * log_probs).sum(2).mean()


def response_limit(num_samples: int, constant: float) -> float:
    """C sqrt(log n): responses are clipped to plus and minus this before they are averaged."""
    return constant * math.sqrt(math.log(num_samples))


def noise_scale(limit: float, bag_size: int, epsilon: float) -> float:
    """Scale of the Laplace noise on bag means that makes them epsilon-differentially private.

    Replacing one response moves a mean by up to 2 limit / k; the paper prints half of it.
    """
    return 2 * limit / (bag_size * epsilon)
