"""Self-distillation for further pre-training (Lee et al. 2023, arXiv 2210.02871).

Further pre-training on a small target overfits. So it is done twice: the result of the first time
is the teacher of the second, which starts again from the first one's own start.

    objective = loss + weight * (1/B) sum_b || h(x_b) - h_teacher(x_b) ||^2

* Masked language models, as the paper's: the loss is that of `masked_tokens`, and h is the last
  hidden state of the first position, CLS, of the whole sequence x, with no token hidden. The model
  runs twice.
* Causal ones, which have no CLS: the loss is `cross_entropy`, and h is the mean of the last hidden
  states.

The squares are summed over the width H, so that `weight` has to fall as H grows. The teacher is
frozen, in evaluation mode. To compare with equal compute, train further without a teacher on twice
the `num_tokens`.

    init: {path: START}
    train.objective: {name: self_distillation, teachers: [{from: FURTHER_TRAINED}], weight: 1.0}
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stillhouse.errors import SpecError
from stillhouse.models.head import head_of, with_bos
from stillhouse.models.masked_lm import last_states
from stillhouse.text.pieces import LOSS_MASK
from stillhouse.training.objectives import LossValue, ObjectiveFacts
from stillhouse.training.objectives.cross_entropy import CrossEntropy
from stillhouse.training.objectives.distil import promoted
from stillhouse.training.objectives.masked_tokens import MaskedTokens
from stillhouse.training.objectives.teaching import counted, only_teacher, pooled, row_shares


def squared_distances(student: Tensor, teacher: Tensor) -> Tensor:
    """|| s - t ||^2 [B] of states [B, H], summed over the width."""
    return (promoted(student) - promoted(teacher.detach())).square().sum(-1)


class SelfDistillation:
    """The loss on the text itself, and the distance of the sequences' states from the teacher's.

    Args:
        facts: of the training.
        weight: of the distance.
        options: of the loss, `rate` of `masked_tokens` or `z_loss` of `cross_entropy`.

    Raises:
        SpecError: a teacher of another width.
    """

    needs_models: ClassVar[bool] = True
    signals: ClassVar[tuple[str, ...]] = (LOSS_MASK,)

    def __init__(self, facts: ObjectiveFacts, weight: float = 1.0, **options: Any) -> None:
        self._facts, self._weight = facts, weight
        self._teacher = only_teacher(facts, "self_distillation")
        plain = CrossEntropy if facts.mask_id is None else MaskedTokens
        self._plain = plain(facts, **options)
        self.hiding = getattr(self._plain, "hiding", None)
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
        if not torch.is_grad_enabled():
            return self._plain(model, input_ids, signals)
        mask = counted(input_ids, signals)
        with torch.no_grad():
            known = self._state(self._states(self._teacher, input_ids), mask)
        hidden = self._states(model, input_ids)
        if isinstance(self._plain, CrossEntropy):  # it reads the same states
            head = head_of(model, self._facts.rule)
            value = self._plain.of(hidden, head, input_ids, signals)
        else:
            value = self._plain(model, input_ids, signals)
        distances = squared_distances(self._state(hidden, mask), known)
        distance = (distances * row_shares(mask)).sum()
        return value._replace(objective=value.objective + self._weight * distance)

    def _states(self, model: PreTrainedModel, input_ids: Tensor) -> Tensor:
        """Last hidden states [B * (T-1), H] of a causal model, [B, T, H] of a masked one."""
        if self.hiding is None:
            return self._facts.hidden(model, input_ids)
        return last_states(model, with_bos(input_ids, self._facts.bos_id))

    def _state(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """h [B, H] of these states; `mask` [B, T-1] marks the tokens that count."""
        if self.hiding is None:
            return pooled(hidden.view(*mask.shape, -1), mask)
        return hidden[:, 0]
