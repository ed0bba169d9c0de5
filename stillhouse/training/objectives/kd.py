"""Knowledge distillation of classifiers (Hinton et al. 2015, arXiv 1503.02531).

objective = (1 - w) CE(labels) + w T^2 KL(teacher || student)
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from stillhouse.classification.learner import LABELS, ClassifierFacts, teacher_logits
from stillhouse.errors import SpecError
from stillhouse.training.objectives import LossValue
from stillhouse.training.objectives.distil import promoted, softmax_kl


class Kd:
    """Cross-entropy mixed with the divergence from teachers.

    Args:
        facts: of the training.
        weight: w of the teachers; 1 - w of the labels.
        temperature: T, at which logits are compared.
    """

    def __init__(
        self, facts: ClassifierFacts, weight: float = 0.5, temperature: float = 4.0
    ) -> None:
        if not 0 <= weight <= 1:
            raise SpecError(f"`train.objective.weight: {weight}` is not between 0 and 1")
        positive(temperature=temperature)
        self._shares, self._weight, self._temperature = facts.teachers, weight, temperature

    def __call__(
        self, network: nn.Module, images: Tensor, signals: Mapping[str, Tensor]
    ) -> LossValue:
        logits = promoted(network(images))
        nll = cross_entropy(logits, signals[LABELS])
        soft = [
            share * softmax_kl(logits, signals[teacher_logits(i)], self._temperature).mean()
            for i, share in enumerate(self._shares)
        ]
        return LossValue((1 - self._weight) * nll + self._weight * torch.stack(soft).sum(), nll)


def positive(**settings: float) -> None:
    """Refuse settings of an objective that are not above 0.

    Raises:
        SpecError: naming the first one.
    """
    for name, value in settings.items():
        if not value > 0:
            raise SpecError(f"`train.objective.{name}: {value}` has to be above 0")


def not_negative(**settings: float) -> None:
    """Refuse settings of an objective that are below 0.

    Raises:
        SpecError: naming the first one.
    """
    for name, value in settings.items():
        if not value >= 0:
            raise SpecError(f"`train.objective.{name}: {value}` has to be 0 or above")
