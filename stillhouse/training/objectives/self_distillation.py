"""Self-distillation for further pre-training (Lee et al. 2023, arXiv 2210.02871).

Further pre-training on a small target overfits. So it is done twice: the result of the first time
is the teacher of the second, which starts again from the first one's own start.

    objective = CE + weight * (1/B) sum_b || h(x_b) - h_teacher(x_b) ||^2

The paper's models are masked and h is their CLS state. `job: train` trains causal models: here h is
the mean of the last hidden states. The squares are summed over the width H, so that `weight` has to
fall as H grows. Both models read the same tokens.

    init: {path: START}
    train.objective: {name: self_distillation, teachers: [{from: FURTHER_TRAINED}], weight: 1.0}
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stillhouse.errors import SpecError
from stillhouse.models.head import head_of
from stillhouse.text.pieces import LOSS_MASK
from stillhouse.training.objectives import LossValue, ObjectiveFacts
from stillhouse.training.objectives.cross_entropy import CrossEntropy
from stillhouse.training.objectives.distil import promoted
from stillhouse.training.objectives.teaching import counted, only_teacher, pooled, row_shares


def squared_distances(student: Tensor, teacher: Tensor) -> Tensor:
    """|| s - t ||^2 [B] of states [B, H], summed over the width."""
    return (promoted(student) - promoted(teacher.detach())).square().sum(-1)


class SelfDistillation:
    """Cross-entropy, and the distance of the sequences' states from the teacher's.

    Args:
        facts: of the training.
        weight: of the distance.
        z_loss: factor of the mean squared logsumexp.

    Raises:
        SpecError: a teacher of another width.
    """

    needs_models: ClassVar[bool] = True
    signals: ClassVar[tuple[str, ...]] = (LOSS_MASK,)

    def __init__(self, facts: ObjectiveFacts, weight: float = 1.0, z_loss: float = 1e-4) -> None:
        self._facts, self._weight = facts, weight
        self._teacher = only_teacher(facts, "self_distillation")
        self._plain = CrossEntropy(facts, z_loss)
        widths = [config.get_text_config().hidden_size for config in facts.configs]
        if len({*widths}) > 1:
            raise SpecError(
                f"`train.objective.teachers.0` has states of width {widths[1]}, the model "
                f"{widths[0]}: self_distillation learns from a copy of itself, trained further"
            )

    def __call__(
        self, model: PreTrainedModel, input_ids: Tensor, signals: Mapping[str, Tensor]
    ) -> LossValue:
        """See `Objective`. Without gradients, as on held-out sequences, the plain loss."""
        hidden = self._facts.hidden(model, input_ids)
        value = self._plain.of(hidden, head_of(model, self._facts.rule), input_ids, signals)
        if not torch.is_grad_enabled():
            return value
        with torch.no_grad():
            known = self._facts.hidden(self._teacher, input_ids)
        mask = counted(input_ids, signals)
        own, other = (pooled(x.view(*mask.shape, -1), mask) for x in (hidden, known))
        distance = (squared_distances(own, other) * row_shares(mask)).sum()
        return value._replace(objective=value.objective + self._weight * distance)
