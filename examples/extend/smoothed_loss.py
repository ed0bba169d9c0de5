"""An objective that is not ours: cross-entropy with smoothed labels.

In a spec of `job: train`, run in this folder (or with it on PYTHONPATH):

    train: {objective: {name: "smoothed_loss:SmoothedLoss", smoothing: 0.1}}

Any class with this constructor and `__call__` is an objective (`stillhouse.training.objectives`).
"""

from collections.abc import Mapping

from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from stillhouse.training.objectives import LossValue, ObjectiveFacts


class SmoothedLoss:
    """A share `smoothing` of each target's probability is spread over all tokens."""

    def __init__(self, facts: ObjectiveFacts, smoothing: float = 0.1) -> None:
        self._facts, self._smoothing = facts, smoothing

    def __call__(
        self, model: PreTrainedModel, input_ids: Tensor, signals: Mapping[str, Tensor]
    ) -> LossValue:
        """Of input_ids [B, T]: what is minimised, and the plain NLL that is reported."""
        logits = self._facts.logits(model, input_ids).flatten(0, 1)
        targets = input_ids[:, 1:].flatten()
        smoothed = cross_entropy(logits, targets, label_smoothing=self._smoothing)
        nll = cross_entropy(logits, targets, reduction="none")
        return LossValue(smoothed, nll.mean(), nll.detach().view(len(input_ids), -1))
