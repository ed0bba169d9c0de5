"""Weak-to-strong generalisation (Burns et al. 2023, arXiv 2312.09390): the confidence loss.

    L = CE(f, (1 - a) f_w + a hard_t(f))

f are the strong model's probabilities, f_w the weak labels, hard_t(f) the strong model's own
prediction, hardened at the threshold t that makes the share of each class what the weak labels
say. Targets carry no gradient. `a` rises linearly from 0 to its maximum over the first part of the
training (the paper); `released` is the schedule of the authors' code, whose warm-up is the step's
share itself, and then jumps.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from stillhouse.classification.learner import ClassifierFacts, mean_over_teachers
from stillhouse.errors import SpecError
from stillhouse.training.objectives import LossValue
from stillhouse.training.objectives.bounds import proportion
from stillhouse.training.objectives.distil import promoted


def confidence_weight(
    progress: float, maximum: float, warmup: float, *, released: bool = False
) -> float:
    """The weight a at `progress` in [0, 1] of the training."""
    if released:
        return maximum * (progress if progress <= warmup else 1.0)
    return maximum * (min(1.0, progress / warmup) if warmup else 1.0)


def threshold(probs: Tensor, weak: Tensor) -> Tensor:
    """Two classes: hardened class 0 is where its probability is at least this; a scalar.

    The quantile of p(class 0) over the whole batch, at the level of the mean weak p(class 1).
    """
    return torch.quantile(probs[:, 0], weak[:, 1].mean().to(probs.dtype))


@dataclass(frozen=True, slots=True)
class Hardening:
    """The rule that makes a model's probabilities one-hot, fitted to a whole batch.

    Attributes:
        threshold: of two classes, as published.
        offsets: of more classes (ours): added to log-probabilities [C], so that the shares of the
            argmax meet the weak shares.
    """

    threshold: Tensor | None = None
    offsets: Tensor | None = None

    @classmethod
    def fit(cls, probs: Tensor, weak: Tensor, rounds: int = 50) -> "Hardening":
        """Fit to probabilities of the strong model and weak labels [n, C] of the same rows.

        Args:
            probs, weak: of the whole global batch.
            rounds: of the fit of the offsets.
        """
        probs, weak = probs.detach(), weak.detach()
        if probs.shape[1] == 2:
            return cls(threshold=threshold(probs, weak))
        wanted, size, logs = weak.mean(0), len(probs), _log(probs)
        offsets = best = torch.zeros_like(wanted)
        best_gap = torch.inf
        for step in range(rounds):
            chosen = (logs + offsets).argmax(1)
            shares = torch.bincount(chosen, minlength=len(wanted)).to(wanted) / size
            gap = float((shares - wanted).abs().sum())
            if gap < best_gap:
                best, best_gap = offsets, gap
            offsets = offsets + (wanted - shares) * 4 / (1 + step) ** 0.5
        return cls(offsets=best)

    def __call__(self, probs: Tensor) -> Tensor:
        """One-hot predictions [n, C]; no gradient."""
        probs = probs.detach()
        if self.threshold is not None:
            first = probs[:, 0] >= self.threshold
            return torch.stack([first, ~first], 1).to(probs.dtype)
        assert self.offsets is not None
        chosen = (_log(probs) + self.offsets).argmax(1)
        return one_hot(chosen, probs.shape[1]).to(probs.dtype)


def _log(probs: Tensor) -> Tensor:
    return probs.clamp(min=torch.finfo(probs.dtype).tiny).log()


def hardened(probs: Tensor, weak: Tensor, *, rounds: int = 50) -> Tensor:
    """One-hot predictions [n, C] whose class shares are about the weak labels' mean; no gradient.

    Args:
        probs: of the strong model [n, C], of the whole global batch.
        weak: weak labels [n, C], of the same rows.
        rounds: as `Hardening.fit`.
    """
    probs = probs.detach()
    return Hardening.fit(probs, weak, rounds)(probs)


def confidence_targets(logits: Tensor, weak: Tensor, weight: float) -> Tensor:
    """(1 - a) f_w + a hard_t(f) [n, C] for logits [n, C]; no gradient."""
    weak = weak.detach()
    return (1 - weight) * weak + weight * hardened(promoted(logits).softmax(1), promoted(weak))


def soft_label_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy, a scalar, of logits [n, C] against distributions [n, C]."""
    return -(targets * promoted(logits).log_softmax(1)).sum(1).mean()


class WeakToStrong:
    """Learns from the weak teachers' labels alone; the true ones are not read.

    The teachers must not have been trained on these images: give them another part of the data.

    Args:
        facts: of the training.
        maximum: of a; 0 is learning from weak labels alone.
        warmup: share of the steps in which a rises.
        schedule: `paper`, or `released` (`confidence_weight`).
    """

    def __init__(
        self,
        facts: ClassifierFacts,
        maximum: float = 0.75,
        warmup: float = 0.2,
        schedule: Literal["paper", "released"] = "paper",
    ) -> None:
        proportion(maximum=maximum, warmup=warmup)
        if schedule not in ("paper", "released"):
            raise SpecError(f"`train.objective.schedule: {schedule}`: use paper or released")
        self._shares, self._maximum, self._warmup = facts.teachers, maximum, warmup
        self._released, self._weight = schedule == "released", 0.0
        self._harden: Hardening | None = None

    def at_step(self, step: int, num_steps: int) -> None:
        """Set a."""
        progress = step / num_steps
        self._weight = confidence_weight(
            progress, self._maximum, self._warmup, released=self._released
        )

    def survey(self, network: nn.Module, images: Tensor, signals: Mapping[str, Tensor]) -> Tensor:
        """The strong model's probabilities and the weak ones, side by side [b, 2 C]."""
        return torch.cat([promoted(network(images)).softmax(1), self._weak(signals)], 1)

    def learn(self, values: Tensor) -> None:
        """Fit the threshold to the whole global batch."""
        probs, weak = values.chunk(2, dim=1)
        self._harden = Hardening.fit(probs, weak)

    def __call__(
        self, network: nn.Module, images: Tensor, signals: Mapping[str, Tensor]
    ) -> LossValue:
        """See `stillhouse.classification.learner`; the NLL is that of the weak labels."""
        logits, weak = promoted(network(images)), self._weak(signals)
        assert self._harden is not None
        hard = self._harden(logits.softmax(1))
        targets = (1 - self._weight) * weak + self._weight * hard
        return LossValue(soft_label_loss(logits, targets), soft_label_loss(logits.detach(), weak))

    def _weak(self, signals: Mapping[str, Tensor]) -> Tensor:
        return mean_over_teachers(self._shares, signals, lambda t: promoted(t).softmax(1))
