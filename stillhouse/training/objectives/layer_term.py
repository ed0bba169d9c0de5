"""The middle term of Distiller: losses between pairs of layers, with what is learned for them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from stillhouse.training.objectives.distil import promoted
from stillhouse.training.objectives.layer_losses import (
    STATE_LOSSES,
    group_means,
    layer_pairs,
    mi_alpha,
    normalised_distance,
    transport_plan,
)
from stillhouse.training.objectives.teaching import pooled

_CRITIC_WIDTH, _CRITIC_SIZE = 64, 32


class LayerTerm(nn.Module):
    """The sum of a loss over pairs of layers; of all pairs, weighed by a plan, with `emd`.

    Args:
        kind: `mse`, `cos`, `ce`, `pkd` or `mi`.
        mapping: `skip`, `last` or `emd`.
        depths, widths: of student and teacher.
        alpha: of `mi`.
        learned: whether the shares of the layers in `emd` are.
        rows: of a group.
    """

    def __init__(
        self,
        kind: str,
        mapping: str,
        depths: Sequence[int],
        widths: Sequence[int],
        *,
        alpha: float,
        learned: bool,
        rows: int,
    ) -> None:
        super().__init__()
        self._kind, self._mapping, self._rows = kind, mapping, rows
        self._alpha_logit = math.log(alpha / (1 - alpha)) if 0 < alpha < 1 else (alpha - 0.5) * 2e4
        every = [(i, j) for i in range(depths[0] + 1) for j in range(depths[1] + 1)]
        self.pairs = every if mapping == "emd" else layer_pairs(mapping, depths[1], depths[0])
        if kind == "mi":
            own, other = (sorted({pair[k] for pair in self.pairs}) for k in (0, 1))
            self.student_critics = nn.ModuleDict({f"{i}": _network(widths[0]) for i in own})
            self.teacher_critics = nn.ModuleDict({f"{j}": _network(widths[1]) for j in other})
            self.baselines = nn.ModuleDict({f"{i}": _network(widths[0], 1) for i in own})
        same = kind == "mi" or widths[0] == widths[1]
        self.widen = nn.Identity() if same else nn.Linear(widths[0], widths[1])
        if mapping == "emd":
            shares = (torch.zeros(depth + 1) for depth in depths)
            self.shares = nn.ParameterList([nn.Parameter(s, requires_grad=learned) for s in shares])

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor) -> Tensor:
        """A mean over groups by their tokens that count, a scalar.

        Args:
            student, teacher: states [B, T, H] of every layer.
            mask: float32 [B, T] of 0 and 1.
        """
        own = [self.widen(promoted(states)) for states in student]
        found = [self._of_pair(i, j, own[i], teacher[j], mask) for i, j in self.pairs]
        costs = torch.stack(found, 1)
        if self._mapping == "emd":
            costs = costs.unflatten(1, (len(student), len(teacher)))
            plan = transport_plan(costs, *(shares.log_softmax(0) for shares in self.shares))
            costs = (plan * costs).flatten(1)
        counts = mask.view(len(costs), -1).sum(1)
        return (costs.sum(1) * counts).sum() / counts.sum().clamp(min=1)

    def _of_pair(self, i: int, j: int, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        """The losses of a pair of layers, one of each group: [G]."""
        if self._kind in STATE_LOSSES:
            return group_means(STATE_LOSSES[self._kind](student, teacher), mask, self._rows)
        own, other = pooled(student, mask), pooled(teacher, mask)
        if self._kind == "pkd":
            counts = mask.sum(1, keepdim=True)
            distances = normalised_distance(own, other)[:, None]
            return group_means(distances, counts, self._rows)
        own, other = (layer_norm(x, x.shape[-1:]) for x in (own, other))
        left, right = self.student_critics[f"{i}"](own), self.teacher_critics[f"{j}"](other)
        baselines = self.baselines[f"{i}"](own)[:, 0]
        groups = zip(*(x.split(self._rows) for x in (left, right, baselines)), strict=True)
        return -torch.stack([mi_alpha(s @ t.T, q, self._alpha_logit) for s, t, q in groups])


def _network(width: int, size: int = _CRITIC_SIZE) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, _CRITIC_WIDTH), nn.ReLU(), nn.Linear(_CRITIC_WIDTH, size))
