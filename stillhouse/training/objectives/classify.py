"""Cross-entropy with the labels of images: the default of `task: classify`."""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from stillhouse.classification.learner import LABELS, ClassifierFacts
from stillhouse.errors import SpecError
from stillhouse.training.objectives import LossValue
from stillhouse.training.objectives.distil import promoted


class Classify:
    """Mean cross-entropy; `label_smoothing` is the share given to all classes alike."""

    def __init__(self, facts: ClassifierFacts, label_smoothing: float = 0.0) -> None:
        if not 0 <= label_smoothing < 1:
            raise SpecError(
                f"`train.objective.label_smoothing: {label_smoothing}` is not in [0, 1)"
            )
        self._smoothing = label_smoothing

    def __call__(
        self, network: nn.Module, images: Tensor, signals: Mapping[str, Tensor]
    ) -> LossValue:
        logits, labels = promoted(network(images)), signals[LABELS]
        nll = cross_entropy(logits, labels)
        if not self._smoothing:
            return LossValue(nll, nll)
        return LossValue(cross_entropy(logits, labels, label_smoothing=self._smoothing), nll)
