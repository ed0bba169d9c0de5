"""Layered self-supervised knowledge distillation (arXiv 2506.07055), after HSAKD (Yang et al.
2021).

Every image enters four times, turned by 0, 90, 180 and 270 degrees, in consecutive rows; branches
on the stages of the network predict class and rotation at once (label 4 class + rotation). There is
no teacher: each branch learns from the next one. The equations of LSSKD could not be had; this is
our reading, with f_l the mean of stage l over places and sg() without gradient:

    a CE(main, upright rows) + b sum_l CE(branch l, joint labels)
      + c T^2 sum_l KL(sg(branch l+1) || branch l) + d sum_l |project(f_l) - sg(f_L)|^2
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from stillhouse.classification.learner import LABELS, ClassifierFacts, reading
from stillhouse.errors import ModelError
from stillhouse.training.objectives import LossValue
from stillhouse.training.objectives.bounds import not_negative, positive
from stillhouse.training.objectives.distil import promoted, softmax_kl

ROTATIONS = 4


def rotated(images: Tensor) -> Tensor:
    """Images [n, ..., H, W] -> [4 n, ..., H, W]: each counter-clockwise by 0, 90, 180, 270."""
    turns = [torch.rot90(images, turn, (-2, -1)) for turn in range(ROTATIONS)]
    return torch.stack(turns, 1).flatten(0, 1)


def joint_labels(labels: Tensor) -> Tensor:
    """Labels [n] -> labels of class and rotation [4 n]."""
    turns = torch.arange(ROTATIONS, device=labels.device)
    return (labels[:, None] * ROTATIONS + turns).flatten()


def branch_loss(branches: Sequence[Tensor], labels: Tensor) -> Tensor:
    """The branches' cross-entropies added up, a scalar; logits [4 n, 4 C], labels [n]."""
    joint = joint_labels(labels)
    return torch.stack([cross_entropy(promoted(logits), joint) for logits in branches]).sum()


def upright_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the rows that are not turned; logits [4 n, C], labels [n]."""
    return cross_entropy(promoted(logits[::ROTATIONS]), labels)


def mimicry(student: Sequence[Tensor], teacher: Sequence[Tensor], temperature: float) -> Tensor:
    """T^2 KL of each pair of logits, mean over rows, added up: a scalar."""
    pairs = zip(student, teacher, strict=True)
    return torch.stack([softmax_kl(s, t, temperature).mean() for s, t in pairs]).sum()


def class_scores(branch: Tensor) -> Tensor:
    """Joint logits [n, 4 C] -> scores of classes [n, C], summed over rotations."""
    return branch.unflatten(1, (-1, ROTATIONS)).sum(2)


def pooled(states: Tensor) -> Tensor:
    """The mean over places [B, C] of a stage's output: [B, C, h, w], or tokens [B, T, C]."""
    return states.mean((2, 3)) if states.dim() == 4 else states.mean(1)


class Branch(nn.Module):
    """A stage's output to joint logits [B, 4 C]; a convolution first where it has places."""

    def __init__(self, states: Tensor, num_classes: int) -> None:
        super().__init__()
        width = pooled(states).shape[1]
        places = states.dim() == 4
        self.mix = nn.Conv2d(width, width, 3, padding=1) if places else nn.Linear(width, width)
        self.joint = nn.Linear(width, ROTATIONS * num_classes)

    def forward(self, states: Tensor) -> Tensor:
        return self.joint(pooled(self.mix(states).relu()))


class Lsskd(nn.Module):
    """Branches on all stages of a network (its attribute `stages`), which are dropped at the end.

    A batch takes four times the memory of plain training.

    Args:
        facts: of the training.
        temperature: T.
        main_weight, branch_weight, mimicry_weight, feature_weight: a, b, c and d.
    """

    def __init__(
        self,
        facts: ClassifierFacts,
        temperature: float = 3.0,
        main_weight: float = 1.0,
        branch_weight: float = 1.0,
        mimicry_weight: float = 1.0,
        feature_weight: float = 0.1,
    ) -> None:
        super().__init__()
        positive(temperature=temperature)
        not_negative(
            main_weight=main_weight,
            branch_weight=branch_weight,
            mimicry_weight=mimicry_weight,
            feature_weight=feature_weight,
        )
        self._temperature = temperature
        self._weights = main_weight, branch_weight, mimicry_weight, feature_weight
        place = next(facts.network.parameters()).device
        shown = torch.zeros(1, *facts.shape, device=place)
        with torch.no_grad(), reading(*stages_of(facts.network)) as states:
            facts.network.eval()(shown)
        self.branches = nn.ModuleList(Branch(one, facts.num_classes) for one in states)
        widths = [pooled(one).shape[1] for one in states]
        self.projections = nn.ModuleList(nn.Linear(one, widths[-1]) for one in widths[:-1])

    def forward(
        self, network: nn.Module, images: Tensor, signals: Mapping[str, Tensor]
    ) -> LossValue:
        """See `stillhouse.classification.learner`."""
        labels = signals[LABELS]
        with reading(*stages_of(network)) as states:
            logits = network(rotated(images))
        branches = [branch(one) for branch, one in zip(self.branches, states, strict=True)]
        nll = upright_loss(logits, labels)
        last = promoted(pooled(states[-1])).detach()
        pairs = zip(self.projections, states[:-1], strict=True)
        gaps = [(promoted(project(pooled(one))) - last).square().mean() for project, one in pairs]
        terms = (
            nll,
            branch_loss(branches, labels),
            mimicry(branches[:-1], branches[1:], self._temperature),
            torch.stack(gaps).sum(),
        )
        total = torch.stack([w * term for w, term in zip(self._weights, terms, strict=True)]).sum()
        return LossValue(total, nll)


def stages_of(network: nn.Module) -> list[nn.Module]:
    """The modules that end the stages of a network, at least two.

    Raises:
        ModelError: it does not say.
    """
    stages: list[nn.Module] = [*getattr(network, "stages", ())]
    if len(stages) < 2:
        raise ModelError(
            f"{type(network).__name__} has {len(stages)} `stages`: `train.objective: lsskd` needs "
            "two or more (a list of modules)"
        )
    return stages
