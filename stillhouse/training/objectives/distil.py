"""Knowledge distillation of next-token distributions (Hinton et al. 2015, arXiv 1503.02531).

    objective = (1 - w) CE + w T^2 KL(teacher || student)

The teacher's distribution is known as its `k` likeliest tokens and the mass of all others, so the
divergence is that between k + 1 events: each kept token, and "any other". It is a lower bound of
the divergence over the whole vocabulary, exact where k = V.

    train.objective: {name: distil, teachers: [{path: MODEL}], weight: 0.5, temperature: 1.0}
"""

from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stillhouse.errors import SpecError
from stillhouse.models.head import head_of
from stillhouse.text.pieces import LOSS_MASK
from stillhouse.training.objectives import LossValue, ObjectiveFacts
from stillhouse.training.objectives.bounds import proportion
from stillhouse.training.objectives.chunked import ChunkLosses, chunked_losses, token_weights
from stillhouse.training.signals import COLUMNS, column


def promoted(values: Tensor) -> Tensor:
    """float32 of lower precisions, in which losses are computed; float64 as it is."""
    return values if values.dtype == torch.float64 else values.float()


class TopTokens(NamedTuple):
    """A teacher's distribution for n positions, as far as it is stored.

    Attributes:
        ids: int64 [n, k], distinct tokens.
        log_probs: [n, k], at temperature 1; -inf where fewer than k tokens are known.
        tail: [n], log of the summed p^(1/T) of all other tokens, for the temperature T that the
            loss is computed at; -inf where there are none.
    """

    ids: Tensor
    log_probs: Tensor
    tail: Tensor

    def at(self, temperature: float) -> Tensor:
        """Log-probabilities float32 [n, k + 1] of the k tokens and of the rest."""
        known = torch.cat([promoted(self.log_probs) / temperature, promoted(self.tail)[:, None]], 1)
        return known.log_softmax(1)


def events(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """The student's log-probabilities float32 [n, k + 1] of tokens [n, k] and of all others.

    The rest's mass is summed from its own logits, not taken as 1 minus the others: that difference
    would round to 0 where the student is confident. Without a rest it is -inf.
    """
    scaled = promoted(logits) / temperature
    rest = scaled.scatter(1, ids, -torch.inf)
    if ids.shape[1] == scaled.shape[1]:
        tail = torch.full_like(scaled[:, :1], -torch.inf)
    else:
        tail = rest.logsumexp(1, keepdim=True)
    return torch.cat([scaled.gather(1, ids), tail], 1) - scaled.logsumexp(1, keepdim=True)


def divergence(teacher: Tensor, student: Tensor, *, reverse: bool = False) -> Tensor:
    """KL(teacher || student) [n] between rows of log-probabilities [n, e]; `reverse` swaps them.

    An event that the first distribution gives no mass counts as 0. The second one's log-probability
    is held at -1e4 or above, so that the result is finite.
    """
    first, second = (student, teacher) if reverse else (teacher, student)
    there = first > -torch.inf
    first = torch.where(there, first, 0.0)
    second = torch.where(there, second.clamp(min=-1e4), 0.0)
    return (torch.where(there, first.exp(), 0.0) * (first - second)).sum(1)


def distillation_loss(
    logits: Tensor, teacher: TopTokens, temperature: float = 1.0, *, reverse: bool = False
) -> Tensor:
    """T^2 KL float32 [n] of student logits [n, V] against what is known of the teacher."""
    student = events(logits, teacher.ids, temperature)
    return temperature**2 * divergence(teacher.at(temperature), student, reverse=reverse)


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """-sum p log q float32 [n] over logits [n, C], with p of the teacher; no factor T^2.

    The loss of distillation on unlabelled text in "Well-read students learn better" (Turc et al.
    2019, arXiv 1908.08962).
    """
    target = (promoted(teacher.detach()) / temperature).softmax(1)
    return -(target * (promoted(student) / temperature).log_softmax(1)).sum(1)


def softmax_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(softmax(t / T) || softmax(s / T)) float32 [n] of logits [n, C]."""
    log_teacher = (promoted(teacher.detach()) / temperature).log_softmax(1)
    log_student = (promoted(student) / temperature).log_softmax(1)
    return temperature**2 * divergence(log_teacher, log_student)


class Distil:
    """Cross-entropy mixed with the divergence from teachers, at every predicted token.

    Args:
        facts: of the training.
        weight: w of the teachers; 1 - w of the text's own tokens.
        temperature: T, one that the signals are kept for.
        direction: `forward`, KL(teacher || student), covers all that the teachers do; `reverse`,
            KL(student || teacher), keeps to their modes.
        z_loss: factor of the mean squared logsumexp.
    """

    signals: ClassVar[tuple[str, ...]] = (LOSS_MASK,)

    def __init__(
        self,
        facts: ObjectiveFacts,
        weight: float = 0.5,
        temperature: float = 1.0,
        direction: Literal["forward", "reverse"] = "forward",
        z_loss: float = 1e-4,
    ) -> None:
        proportion(weight=weight)
        if direction not in ("forward", "reverse"):
            raise SpecError(f"`train.objective.direction: {direction}`: use forward or reverse")
        self._facts, self._weight, self._temperature = facts, weight, temperature
        self._reverse, self._z_loss = direction == "reverse", z_loss
        self._tail = facts.temperatures.index(temperature)

    def __call__(
        self, model: PreTrainedModel, input_ids: Tensor, signals: Mapping[str, Tensor]
    ) -> LossValue:
        """See `Objective`. Held-out sequences, which have no signals, have the plain loss."""
        facts = self._facts
        hidden = facts.hidden(model, input_ids)
        count = len(hidden)
        columns = [input_ids[:, 1:].flatten()]
        for i in range(len(facts.teachers) if signals else 0):
            ids, log_probs, tails = (signals[column(name, i)] for name in COLUMNS)
            columns += [ids.view(count, -1).long(), log_probs.view(count, -1)]
            columns += [tails.view(count, -1)[:, self._tail]]
        head, weights = head_of(model, facts.rule), token_weights(signals.get(LOSS_MASK))
        objective, nll, token_nll = chunked_losses(hidden, head, self._losses, columns, weights)
        return LossValue(objective, nll, token_nll.view(len(input_ids), -1))

    def _losses(self, logits: Tensor, targets: Tensor, *stored: Tensor) -> ChunkLosses:
        log_z = logits.logsumexp(1)
        nll = log_z - logits.gather(1, targets[:, None])[:, 0]
        objective = nll + self._z_loss * log_z.square()
        if stored:
            shares = self._facts.teachers
            teachers = [TopTokens(*stored[3 * i : 3 * i + 3]) for i in range(len(shares))]
            losses = [
                share * distillation_loss(logits, one, self._temperature, reverse=self._reverse)
                for share, one in zip(shares, teachers, strict=True)
            ]
            soft = torch.stack(losses).sum(0)
            objective = (1 - self._weight) * objective + self._weight * soft
        return ChunkLosses(objective, nll)
