"""Dual-head knowledge distillation (Yang et al. 2024, arXiv 2411.08937).

    objective = gamma CE(head 1, labels) + alpha BinaryKL-Norm(head 2, teacher)

Both heads read the same features; head 2 is dropped after the training. On a conflict of the two
gradients over all parameters the distillation's component along the other is taken away
(`aligned`), which the paper uses for pairs of different architectures.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, logsigmoid

from stillhouse.classification.learner import (
    LABELS,
    ClassifierFacts,
    classifier_layer,
    mean_over_teachers,
    with_features,
)
from stillhouse.errors import SpecError
from stillhouse.training.objectives import LossValue
from stillhouse.training.objectives.bounds import not_negative, positive
from stillhouse.training.objectives.distil import promoted, softmax_kl


def binary_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 times the sum over classes of KL(sigmoid(t/T) || sigmoid(s/T)), mean over rows [n, C]."""
    s, t = (promoted(x) / temperature for x in (student, teacher.detach()))
    losses = t.sigmoid() * (logsigmoid(t) - logsigmoid(s))
    losses = losses + (-t).sigmoid() * (logsigmoid(-t) - logsigmoid(-s))
    return temperature**2 * losses.sum(1).mean()


def binary_kl_norm(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The mean over rows, a scalar, of `norm_kls`."""
    return norm_kls(student, teacher, temperature).mean()


def norm_kls(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 times the sum over classes of KL(1/2 || sigmoid((s - t)/T)): [n] of logits [n, C].

    By log-sigmoid: a clamped sigmoid is infinite in float32 from differences of about 17 T on.
    """
    z = (promoted(student) - promoted(teacher.detach())) / temperature
    losses = -torch.log(z.new_tensor(2.0)) - (logsigmoid(z) + logsigmoid(-z)) / 2
    return temperature**2 * losses.sum(1)


def aligned(hard: Sequence[Tensor], soft: Sequence[Tensor]) -> list[Tensor]:
    """The two gradients added, without the part of `soft` that points against `hard`.

    Both are lists over ALL parameters, zero where a loss does not reach one, and must be summed
    over the workers before: <soft, hard> of parts is another number. Where it is negative,
    soft - (<soft, hard> / |hard|^2) hard takes the place of soft.
    """
    dot = sum((torch.dot(h.flatten(), s.flatten()) for h, s in zip(hard, soft, strict=True)))
    norm = sum(h.square().sum() for h in hard)
    assert isinstance(dot, Tensor) and isinstance(norm, Tensor)
    factor = torch.where(norm > 0, (-dot).clamp(min=0) / norm.clamp(min=1e-38), 0.0)
    return [s + (1 + factor) * h for h, s in zip(hard, soft, strict=True)]


def _softmax(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    return softmax_kl(student, teacher, temperature).mean()


_LOSSES = {"binary_kl_norm": binary_kl_norm, "binary_kl": binary_kl, "kl": _softmax}


class Dhkd(nn.Module):
    """Two heads on the features that the network's `classifier` reads; the second one is its own.

    Args:
        facts: of the training.
        gamma, alpha: weights of the labels and of the teachers.
        temperature: T, at which logits are compared.
        loss: `binary_kl_norm`, the published one; `binary_kl` and `kl` to compare.
        heads: 2, the published; 1 to compare: the network's own head takes both losses.
        head: the second one: `linear`, or `nonlinear` for pairs of different architectures (with
            batch norm, so on one worker).
        align: whether gradients are aligned (`aligned`), as for such pairs.
    """

    def __init__(
        self,
        facts: ClassifierFacts,
        gamma: float = 1.0,
        alpha: float = 1.0,
        temperature: float = 2.0,
        loss: Literal["binary_kl_norm", "binary_kl", "kl"] = "binary_kl_norm",
        heads: int = 2,
        head: Literal["linear", "nonlinear"] = "linear",
        align: bool = False,
    ) -> None:
        super().__init__()
        positive(temperature=temperature)
        not_negative(gamma=gamma, alpha=alpha)
        for name, value, known in (
            ("loss", loss, [*_LOSSES]),
            ("heads", heads, [1, 2]),
            ("head", head, ["linear", "nonlinear"]),
        ):
            if value not in known:
                raise SpecError(f"`train.objective.{name}: {value}`: one of {known}")
        self._gamma, self._alpha, self._temperature = gamma, alpha, temperature
        self._loss, self._shares, self._align = _LOSSES[loss], facts.teachers, align
        self.head: nn.Module | None = None
        if heads == 2:
            width, classes = classifier_layer(facts.network).in_features, facts.num_classes
            self.head = nn.Linear(width, classes)
            if head == "nonlinear":
                self.head = nn.Sequential(
                    nn.Linear(width, 200),
                    nn.Dropout(0.1),
                    nn.BatchNorm1d(200),
                    nn.ReLU(),
                    nn.Linear(200, classes),
                )

    def forward(
        self, network: nn.Module, images: Tensor, signals: Mapping[str, Tensor]
    ) -> LossValue:
        """See `stillhouse.classification.learner`."""
        logits, features = with_features(network, images)
        nll = cross_entropy(promoted(logits), signals[LABELS])
        other = logits if self.head is None else self.head(features)
        soft = self._alpha * mean_over_teachers(
            self._shares, signals, lambda t: self._loss(other, t, self._temperature)
        )
        if self._align:
            return LossValue(self._gamma * nll, nll, second=soft)
        return LossValue(self._gamma * nll + soft, nll)

    def join(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> list[Tensor]:
        """The aligned gradients of both losses."""
        return aligned(first, second)
