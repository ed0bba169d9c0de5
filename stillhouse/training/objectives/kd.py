"""Knowledge distillation of classifiers (Hinton et al. 2015, arXiv 1503.02531).

objective = (1 - w) CE(labels) + w T^2 KL(teacher || student)
"""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from stillhouse.classification.learner import LABELS, ClassifierFacts, mean_over_teachers
from stillhouse.training.objectives import LossValue
from stillhouse.training.objectives.bounds import positive, proportion
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
        proportion(weight=weight)
        positive(temperature=temperature)
        self._shares, self._weight, self._temperature = facts.teachers, weight, temperature

    def __call__(
        self, network: nn.Module, images: Tensor, signals: Mapping[str, Tensor]
    ) -> LossValue:
        logits = promoted(network(images))
        nll = cross_entropy(logits, signals[LABELS])
        soft = mean_over_teachers(
            self._shares, signals, lambda t: softmax_kl(logits, t, self._temperature).mean()
        )
        return LossValue((1 - self._weight) * nll + self._weight * soft, nll)
