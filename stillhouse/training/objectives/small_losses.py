"""Options that are a formula each: self-past distillation, co-teaching, ranking of losses."""

from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from stillhouse.classification.learner import LABELS, ROWS, ClassifierFacts
from stillhouse.errors import SpecError
from stillhouse.training.objectives import LossValue
from stillhouse.training.objectives.bounds import not_negative, positive
from stillhouse.training.objectives.distil import promoted, softmax_kl


def small_loss_rows(losses: Tensor, forget_rate: float) -> Tensor:
    """Co-teaching (Han et al. 2018, arXiv 1804.06872): rows that the other network learns from.

    The int((1 - forget_rate) n) rows of the smallest losses [n], ascending.
    """
    return losses.argsort(stable=True)[: int((1 - forget_rate) * len(losses))]


def past_slots(epoch: int, lag: int) -> tuple[int, int | None]:
    """Self-past distillation (SAF, Du et al. 2022): slots of a ring of lag + 1 epochs of logits.

    The slot that an epoch writes, and the one of `lag` epochs before; None until there is one.
    """
    return epoch % (lag + 1), (epoch - lag) % (lag + 1) if epoch >= lag else None


def ranking_loss(predicted: Tensor, losses: Tensor) -> Tensor:
    """How well scores order losses within each row, a scalar: for an amortised scorer.

    Cross-entropy over all ordered pairs of different losses: sigmoid(predicted_i - predicted_j)
    against losses_i > losses_j, both [n, m]; 0 if no losses of a row differ.
    """
    predicted, losses = promoted(predicted), promoted(losses)
    gaps = losses[:, :, None] - losses[:, None, :]
    wins = (predicted[:, :, None] - predicted[:, None, :]).sigmoid()
    log_wins, log_defeats = (wins + 1e-6).log(), (1 - wins + 1e-6).log()
    pairs = torch.where(gaps > 0, -log_wins, torch.where(gaps < 0, -log_defeats, 0.0))
    return pairs.sum() / (gaps != 0).sum().clamp(min=1)


class SelfPast(nn.Module):
    """Cross-entropy, and T^2 KL from the network's own logits of `lag` epochs before (SAF).

    The logits of the last epochs are on every worker and in checkpoints, as float16 [lag + 1, N,
    C]; a pass more each step gathers them.
    """

    def __init__(
        self, facts: ClassifierFacts, lag: int = 3, weight: float = 1.0, temperature: float = 2.0
    ) -> None:
        super().__init__()
        positive(lag=lag, temperature=temperature)
        not_negative(weight=weight)
        self._lag, self._weight, self._temperature = lag, weight, temperature
        shape = lag + 1, facts.num_images, facts.num_classes
        self.past: Tensor
        self.visits: Tensor
        self.register_buffer("past", torch.zeros(shape, dtype=torch.float16))
        self.register_buffer("visits", torch.zeros(facts.num_images, dtype=torch.int64))

    def survey(self, network: nn.Module, images: Tensor, signals: Mapping[str, Tensor]) -> Tensor:
        """Logits and row [b, C + 1]."""
        logits = promoted(network(images))
        return torch.cat([logits, signals[ROWS][:, None].to(logits)], 1)

    def learn(self, values: Tensor) -> None:
        """Keep the logits of the global batch."""
        rows = values[:, -1].long()
        for epoch in self.visits[rows].unique().tolist():
            mine = self.visits[rows] == epoch
            self.past[past_slots(epoch, self._lag)[0], rows[mine]] = values[mine, :-1].half()
        self.visits[rows] += 1

    def forward(
        self, network: nn.Module, images: Tensor, signals: Mapping[str, Tensor]
    ) -> LossValue:
        """See `stillhouse.classification.learner`."""
        logits, rows = promoted(network(images)), signals[ROWS]
        nll = cross_entropy(logits, signals[LABELS])
        epochs = self.visits[rows] - 1
        slots = (epochs - self._lag) % (self._lag + 1)
        soft = softmax_kl(logits, self.past[slots, rows], self._temperature)
        return LossValue(nll + self._weight * (soft * (epochs >= self._lag)).mean(), nll)


class CoTeaching(nn.Module):
    """Two networks; each learns from the images of the batch with the smallest losses in the other.

    `forget_rate` of the batch is left out, rising to it over the first `ramp` of the steps. The
    second network starts from another seed and is dropped at the end.
    """

    def __init__(self, facts: ClassifierFacts, forget_rate: float = 0.2, ramp: float = 0.2) -> None:
        super().__init__()
        for name, value in (("forget_rate", forget_rate), ("ramp", ramp)):
            if not 0 <= value < 1:
                raise SpecError(f"`train.objective.{name}: {value}` is not in [0, 1)")
        self._rate, self._ramp, self._now = forget_rate, ramp, 0.0
        self.peer = deepcopy(facts.network)
        torch.manual_seed(facts.seed + 1)  # within the draws of this objective's own weights
        for module in self.peer.modules():
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
        self._chosen: list[Tensor] = []
        self._scale = 1.0

    def at_step(self, step: int, num_steps: int) -> None:
        """Set the share that is left out."""
        done = step / num_steps
        self._now = self._rate * (min(1.0, done / self._ramp) if self._ramp else 1.0)

    def _losses(self, network: nn.Module, images: Tensor, labels: Tensor) -> list[Tensor]:
        both = [promoted(one(images)) for one in (network, self.peer)]
        return [cross_entropy(logits, labels, reduction="none") for logits in both]

    def survey(self, network: nn.Module, images: Tensor, signals: Mapping[str, Tensor]) -> Tensor:
        """Losses of both networks, and row [b, 3]."""
        losses = self._losses(network, images, signals[LABELS])
        return torch.stack([*losses, signals[ROWS].to(losses[0])], 1)

    def learn(self, values: Tensor) -> None:
        """Choose rows of the global batch: for each network by the losses of the other."""
        rows = values[:, 2].long()
        self._chosen = [rows[small_loss_rows(values[:, i], self._now)] for i in (1, 0)]
        self._scale = len(rows) / max(1, len(self._chosen[0]))

    def forward(
        self, network: nn.Module, images: Tensor, signals: Mapping[str, Tensor]
    ) -> LossValue:
        """See `stillhouse.classification.learner`; the NLL is the first network's, of all rows."""
        losses = self._losses(network, images, signals[LABELS])
        kept = [torch.isin(signals[ROWS], rows) for rows in self._chosen]
        pairs = zip(losses, kept, strict=True)
        means = [(loss * mine).mean() * self._scale for loss, mine in pairs]
        return LossValue(torch.stack(means).sum(), losses[0].detach().mean())
