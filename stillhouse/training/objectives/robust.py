"""Robust self-supervised training (arXiv 2310.00027): unlabelled data of a nearby domain.

    phi_g(x, y) = sup_z l(z, y) - g c(z, x)
    objective   = mean phi_gamma(x, y) over labelled
                + lambda * mean phi_gamma'(x', own decision) over unlabelled

Start from the labelled solution: from a random one the second term finds any gap between clusters.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from stillhouse.classification.learner import LABELS, ClassifierFacts
from stillhouse.classification.spec import ClassifierTraining
from stillhouse.errors import SpecError
from stillhouse.training.objectives import LossValue
from stillhouse.training.objectives.bounds import not_negative, positive
from stillhouse.training.objectives.distil import promoted

_LABELLED = 15  # first word of a random generator's key


def linear_margin(decision: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """phi [n] of a linear classifier with 0-1 loss and Euclidean cost.

    Args:
        decision: f(x) = theta . x / |theta|, [n].
        labels: -1 or 1, [n].
        gamma: the price of a unit of distance.
    """
    return (1 - gamma * labels * decision).clamp(0, 1)


def own_labels(decision: Tensor) -> Tensor:
    """The model's decisions as labels -1 or 1, [n]; 1 at 0. No gradient."""
    return torch.where(decision.detach() >= 0, 1.0, -1.0).to(decision.dtype)


def linear_objective(
    theta: Tensor,
    labelled: tuple[Tensor, Tensor],
    unlabelled: Tensor,
    gammas: tuple[float, float],
    weight: float,
) -> Tensor:
    """The objective, a scalar, of a direction theta [d] of any length."""
    direction = theta / theta.norm()
    x, y = labelled
    first, other = x @ direction, unlabelled @ direction
    supervised = linear_margin(first, y.to(first.dtype), gammas[0]).mean()
    return supervised + weight * linear_margin(other, own_labels(other), gammas[1]).mean()


def worst_case(
    loss: Callable[[Tensor], Tensor], inputs: Tensor, gamma: float | Tensor, steps: int = 15
) -> Tensor:
    """Inputs [n, ...] moved to where loss - gamma |z - x|^2 is largest, by gradient ascent.

    One step of 1 along (0.5 / gamma) grad loss, then `steps` of 1 / sqrt(t + 2) along that
    gradient minus (z - x). It converges only where gamma exceeds the curvature of the loss.

    Args:
        loss: losses [n] of inputs, each of its own row.
        inputs: x; the result has no graph.
        gamma: the price of squared distance, or one for each row [n, 1, ...].
        steps: after the first one.
    """
    start = inputs.detach()

    def pull(point: Tensor) -> Tensor:
        point = point.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(point).sum(), point)
        return gradient * (0.5 / gamma)

    moved = start + pull(start)
    for step in range(steps):
        moved = moved + (pull(moved) - (moved - start)) / (step + 2) ** 0.5
    return moved.detach()


class Robust:
    """Labelled images, and others without labels, which may be of a nearby domain (RSS).

    The others are those of `unlabelled`, or all beside a labelled part of the images of `data`.

    Images are moved by gradient ascent to where loss minus price is largest; labels of the
    unlabelled ones are the network's own decisions. Start from the labelled solution (`init`): it
    is the same objective with `weight: 0`.

    Args:
        facts: of the training.
        num_labelled: images of `data` whose labels are read, drawn by class from the seed; with
            `unlabelled` all are read.
        weight: lambda of the unlabelled ones.
        gamma, gamma_unlabelled: prices of squared distance; they have to exceed the curvature of
            the loss.
        steps: of the ascent; each is a pass.
    """

    def __init__(
        self,
        facts: ClassifierFacts,
        num_labelled: int | None = None,
        weight: float = 1.0,
        gamma: float = 1.0,
        gamma_unlabelled: float = 1.0,
        steps: int = 5,
    ) -> None:
        positive(gamma=gamma, gamma_unlabelled=gamma_unlabelled)
        not_negative(weight=weight, steps=steps)
        self._gammas, self._steps = (gamma, gamma_unlabelled), steps
        # a mean over a batch of rows so weighted is, on average, that of both parts apart
        others = _share_of_others(facts, num_labelled)
        self._scales = 1 / (1 - others), weight / others if others else 0.0

    @staticmethod
    def columns(
        columns: Mapping[str, Tensor],
        bags: NDArray[np.int64],
        settings: ClassifierTraining,
        num_classes: int,
    ) -> dict[str, Tensor]:
        """Labels of the labelled images; -1 of all others."""
        count = settings.objective.options.get("num_labelled")
        if count is None:
            return {**columns}
        labels, draws = columns[LABELS], np.random.default_rng([_LABELLED, settings.seed])
        each = int(count) // num_classes
        known = torch.full_like(labels, -1)
        for label in range(num_classes):
            rows = torch.from_numpy(draws.permutation(np.flatnonzero(labels.numpy() == label)))
            known[rows[:each]] = label
        return {**columns, LABELS: known}

    def __call__(
        self, network: nn.Module, images: Tensor, signals: Mapping[str, Tensor]
    ) -> LossValue:
        """See `stillhouse.classification.learner`; the NLL is that of the labelled images."""
        labels = signals[LABELS]
        known = labels >= 0
        with torch.no_grad():
            logits = promoted(network(images))
        targets = torch.where(known, labels, logits.argmax(1))
        price = torch.where(known, *map(images.new_tensor, self._gammas))

        def loss(moved: Tensor) -> Tensor:
            return cross_entropy(promoted(network(moved)), targets, reduction="none")

        moved = worst_case(loss, images, price[:, None, None, None], self._steps)
        cost = price * (moved - images).square().flatten(1).sum(1)
        scale = torch.where(known, *map(images.new_tensor, self._scales))
        own = cross_entropy(logits, targets, reduction="none")
        nll = (own * known * self._scales[0]).mean()
        return LossValue(((loss(moved) - cost) * scale).mean(), nll)


def _share_of_others(facts: ClassifierFacts, num_labelled: int | None) -> float:
    """The share of images without labels among those of a batch, on average."""
    if (num_labelled is None) == (facts.unlabelled_share is None):
        raise SpecError(
            "`train.objective: robust` needs images without labels: give either `unlabelled` or "
            "`train.objective.num_labelled`"
        )
    if num_labelled is None:
        assert facts.unlabelled_share is not None
        return facts.unlabelled_share
    count = num_labelled // facts.num_classes * facts.num_classes
    if not 0 < count <= facts.num_images:
        raise SpecError(
            f"`train.objective.num_labelled: {num_labelled}`: there are {facts.num_classes} "
            f"classes and {facts.num_images} images"
        )
    return 1 - count / facts.num_images
