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
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import one_hot

from stillhouse.classification.learner import LABELS, ClassifierFacts
from stillhouse.classification.spec import ClassifierTraining
from stillhouse.training.objectives import LossValue
from stillhouse.training.objectives.bounds import positive, proportion
from stillhouse.training.objectives.distil import promoted

_SHARES = "shares"
_NOISE = 13  # first word of a random generator's key


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


def bag_loss(logits: Tensor, labels: Tensor, bags: Tensor) -> Tensor:
    """L_bag, a scalar, of bags [m, k] of rows of logits [n, C] and labels [n].

    Of held-out bags it chooses rho without a label of a single image.
    """
    shares = one_hot(labels[bags], logits.shape[1]).to(logits.dtype).mean(1)
    return cross_entropy(logits.log_softmax(1)[bags], shares, 0.0)


def response_limit(num_samples: int, constant: float) -> float:
    """C sqrt(log n): responses are clipped to plus and minus this before they are averaged."""
    return constant * math.sqrt(math.log(num_samples))


def noise_scale(limit: float, bag_size: int, epsilon: float) -> float:
    """Scale of the Laplace noise on bag means that makes them epsilon-differentially private.

    Replacing one response moves a mean by up to 2 limit / k; the paper prints half of it.
    """
    return 2 * limit / (bag_size * epsilon)


class Bags:
    """Learns a classifier from the class shares of bags; labels of single images are not read.

    Bags are drawn once, from the seed; images that fill no bag are left out. The noise is drawn
    once as well, and noisy shares are clipped at 0 and scaled to add up to 1.

    Args:
        facts: of the training.
        bag_size: k.
        rho: share of the instance loss.
        epsilon: of differential privacy of a label; None: no noise.
    """

    def __init__(
        self,
        facts: ClassifierFacts,
        bag_size: int = 1,
        rho: float = 0.1,
        epsilon: float | None = None,
    ) -> None:
        proportion(rho=rho)
        if epsilon is not None:
            positive(epsilon=epsilon)
        self._rho, self.rows_together = rho, bag_size

    @staticmethod
    def columns(
        columns: Mapping[str, Tensor],
        bags: NDArray[np.int64],
        settings: ClassifierTraining,
        num_classes: int,
    ) -> dict[str, Tensor]:
        """The shares of each image's bag in place of its label."""
        labels = columns[LABELS]
        known = one_hot(labels[torch.from_numpy(bags)], num_classes).float().mean(1)
        epsilon = settings.objective.options.get("epsilon")
        if epsilon is not None:
            draws = np.random.default_rng([_NOISE, settings.seed])
            scale = noise_scale(1.0, bags.shape[1], epsilon)
            noise = draws.laplace(scale=scale, size=tuple(known.shape))
            known = (known + torch.from_numpy(noise).float()).clamp(min=1e-6)
            known = known / known.sum(1, keepdim=True)
        shares = torch.zeros(len(labels), num_classes)
        shares[torch.from_numpy(bags.reshape(-1))] = known.repeat_interleave(bags.shape[1], 0)
        return {_SHARES: shares}

    def __call__(
        self, network: nn.Module, images: Tensor, signals: Mapping[str, Tensor]
    ) -> LossValue:
        """See `stillhouse.classification.learner`; the NLL is the bag loss."""
        logits, size = promoted(network(images)), self.rows_together
        log_probs = logits.log_softmax(1).unflatten(0, (-1, size))
        shares = signals[_SHARES][::size]
        nll = cross_entropy(log_probs, shares, 0.0)
        return LossValue(cross_entropy(log_probs, shares, self._rho), nll)
