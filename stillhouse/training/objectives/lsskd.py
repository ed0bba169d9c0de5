"""Layered self-supervised knowledge distillation (arXiv 2506.07055), after HSAKD (Yang et al.
2021).

Every image enters four times, turned by 0, 90, 180 and 270 degrees, in consecutive rows; branches
on the stages of the network predict class and rotation at once (label 4 class + rotation). The
equations of LSSKD could not be had: what combines the terms below is our reading.

    student = CE(main, upright rows) + T^2 sum_l KL(teacher branch l || student branch l)
              + T^2 KL(teacher main || student main)
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

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
