"""Dual-head distillation (Yang et al. 2024, arXiv 2411.08937) of language models.

    objective = gamma CE(output matrix, text) + alpha BinaryKL-Norm(second output matrix, teacher)

As `dhkd` does with classifiers: both output matrices read the same hidden states, so that what
teacher and text want of the last layer does not collide; the second one is not kept with the model.
The divergence is a sum over the vocabulary, so that `alpha` has to fall as it grows.

    train.objective: {name: dhkd, teachers: [{path: T}], alpha: 0.01}
"""

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stillhouse.errors import SpecError
from stillhouse.models.device import initialised
from stillhouse.models.head import Head, head_of, logit_rule
from stillhouse.text.pieces import LOSS_MASK
from stillhouse.training.objectives import LossValue, ObjectiveFacts
from stillhouse.training.objectives.bounds import not_negative, positive
from stillhouse.training.objectives.chunked import ChunkLosses, chunked_losses, token_weights
from stillhouse.training.objectives.cross_entropy import CrossEntropy
from stillhouse.training.objectives.dhkd import aligned, norm_kls
from stillhouse.training.objectives.teaching import only_teacher


class DualHead(nn.Module):
    """Learns from the text, and with a second output matrix from one teacher.

    Args:
        facts: of the training.
        gamma, alpha: weights of the text and of the teacher.
        temperature: T, at which logits are compared.
        align: whether the teacher's gradient loses what points against that of the text.
        z_loss: factor of the mean squared logsumexp, of the first matrix.
        seed: of the second matrix.

    Raises:
        SpecError: a setting out of range, or `align` of sharded or compiled layers.
    """

    needs_models: ClassVar[bool] = True
    signals: ClassVar[tuple[str, ...]] = (LOSS_MASK,)

    def __init__(
        self,
        facts: ObjectiveFacts,
        gamma: float = 1.0,
        alpha: float = 1.0,
        temperature: float = 2.0,
        align: bool = False,
        z_loss: float = 1e-4,
        seed: int = 0,
    ) -> None:
        super().__init__()
        positive(temperature=temperature)
        not_negative(gamma=gamma, alpha=alpha)
        if align and facts.group.sharded:
            raise SpecError("`train.objective.align` needs whole gradients: no `train.sharding`")
        if align and facts.compiled:  # compiled layers free what a second pass would read
            raise SpecError("`train.objective.align` goes back twice: set `train.compile: off`")
        self._facts, self._rule = facts, logit_rule(only_teacher(facts, "dhkd"))
        self._plain = CrossEntropy(facts, z_loss)
        self._gamma, self._alpha, self._temperature = gamma, alpha, temperature
        self._align = align
        sizes = [config.vocab_size for config in facts.configs]
        self._vocab = int(min(facts.vocab_size or math.inf, *sizes))
        width = facts.configs[0].hidden_size
        self.head = initialised(lambda: nn.Linear(width, self._vocab, bias=False), seed)

    def forward(
        self, model: PreTrainedModel, input_ids: Tensor, signals: Mapping[str, Tensor]
    ) -> LossValue:
        """See `Objective`. Without gradients, as on held-out sequences, the plain loss."""
        facts, teacher = self._facts, self._facts.models[0]
        hidden = facts.hidden(model, input_ids)
        value = self._plain.of(hidden, head_of(model, facts.rule), input_ids, signals)
        if not torch.is_grad_enabled():
            return value
        with torch.no_grad():
            states = facts.hidden(teacher, input_ids)
        known = Head(*head_of(teacher, self._rule))

        def losses(logits: Tensor, taught: Tensor) -> ChunkLosses:
            with torch.no_grad():
                target = known.logits(taught)[:, : self._vocab]
            found = norm_kls(logits, target, self._temperature)
            return ChunkLosses(found, found)

        weights = token_weights(signals.get(LOSS_MASK))
        second = Head(self.head.weight, None, facts.rule)
        soft = self._alpha * chunked_losses(hidden, second, losses, [states], weights)[0]
        text = self._gamma * value.objective
        if self._align:
            return value._replace(objective=text, second=soft)
        return value._replace(objective=text + soft)

    def join(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> list[Tensor]:
        """The aligned gradients of both losses."""
        return aligned(first, second)
