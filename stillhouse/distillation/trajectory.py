"""Trajectory matching: train a student on the synthetic set, compare it with where experts went.

MTT (Cazenavette et al. 2022): from an expert's parameters theta_0 = expert[t], N steps on the
synthetic set lead to theta_N, and

    L = ||theta_N - expert[t+M]||^2 / ||theta_0 - expert[t+M]||^2

is differentiated through the steps to the images, to the step size eta and, with DATM (Guo et al.
2024), to label logits. The gradient is exact and needs the memory of one step
(`stillhouse.distillation.adjoint`).

TESLA (Cui et al. 2023) has the same L but leaves out how theta_n moves with earlier images. That is
the adjoint without its Hessian-vector products: dL/dx_n = (2/D) d[(eta (theta* - theta_0) +
eta^2 G) . g_n]/dx, G = sum_n g_n, D = ||theta_0 - theta*||^2. (The released code applies half.)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from stillhouse.distillation.adjoint import (
    Descent,
    FlatModule,
    Gradients,
    Run,
    StepLoss,
    adjoint,
    alone,
    descend,
)
from stillhouse.distillation.augment import AugmentDraw, augment, draw_augmentation
from stillhouse.distillation.recipes import Group


@dataclass(frozen=True, slots=True)
class SyntheticSet:
    """What is learned: images [S, C, H, W], a label each, and the step size eta to train with.

    `labels` are classes (int64 [S]), or the logits of soft labels (float [S, K]), which are then
    learned as well.
    """

    images: Tensor
    labels: Tensor
    learning_rate: Tensor

    @property
    def soft(self) -> bool:
        """Whether the labels are logits."""
        return self.labels.is_floating_point()


@dataclass(frozen=True, slots=True)
class StepImages:
    """One inner step's images by row, their augmentation, and the share of the step's batch."""

    rows: Tensor
    draw: AugmentDraw | None = None
    share: float = 1.0

    def part(self, rank: int, size: int) -> "StepImages":
        """What worker `rank` of `size` computes; the parts' losses add up to the batch's.

        Not for batch norm, whose statistics are the whole batch's.
        """
        count = len(self.rows)
        own = slice(count * rank // size, count * (rank + 1) // size)
        draw = None if self.draw is None else self.draw.part(own)
        return StepImages(self.rows[own], draw, self.share * (own.stop - own.start) / count)


@dataclass(frozen=True, slots=True)
class Match:
    """Where the student should be after `step` inner steps: `target` [P], times `weight`."""

    step: int
    target: Tensor
    weight: float = 1.0


def draw_batches(
    num_images: int,
    batch_size: int,
    num_steps: int,
    image_size: int,
    groups: Sequence[Group],
    generator: torch.Generator,
) -> tuple[StepImages, ...]:
    """Batches of `num_steps` inner steps, with their augmentation (none where `groups` is empty).

    Permutations of all images are cut into chunks, which are used from the last one on.
    """
    batches: list[StepImages] = []
    chunks: list[Tensor] = []
    for _ in range(num_steps):
        if not chunks:
            chunks = list(torch.randperm(num_images, generator=generator).split(batch_size))
        rows = chunks.pop()
        draw = draw_augmentation(groups, len(rows), image_size, generator) if groups else None
        batches.append(StepImages(rows, draw))
    return tuple(batches)


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits [B, K] to classes [B], or to softmax of label logits [B, K]."""
    if labels.is_floating_point():
        return -(labels.softmax(1) * logits.log_softmax(1)).sum(1).mean()
    return cross_entropy(logits, labels)


def matching_loss(theta: Tensor, start: Tensor, target: Tensor) -> Tensor:
    """||theta - target||^2 / ||start - target||^2 of vectors [P]; 1 where nothing was learned."""
    return (theta - target).square().sum() / (start - target).square().sum()


def inner_loss(
    network: FlatModule,
    synthetic: SyntheticSet,
    batches: Sequence[StepImages],
    scale: float = 1.0,
) -> StepLoss:
    """The student's loss at inner step n and theta [P]: of batch n of the set, times `scale`."""

    def loss(step: int, theta: Tensor) -> Tensor:
        batch = batches[step]
        images = synthetic.images[batch.rows]
        if batch.draw is not None:
            images = augment(images, batch.draw)
        value = label_loss(network(theta, images), synthetic.labels[batch.rows])
        return value * (scale * batch.share)

    return loss


def matching_gradients(
    network: FlatModule,
    synthetic: SyntheticSet,
    batches: Sequence[StepImages],
    start: Tensor,
    matches: Sequence[Match],
    *,
    momentum: float = 0.0,
    loss_scale: float = 1.0,
    first_order: bool = False,
    all_reduce: Callable[[Tensor], Tensor] = alone,
) -> tuple[Gradients, Run]:
    """The gradients of the sum of the matching losses, and the student's run.

    Leaves are the images, and labels if they are soft; `terms` maps a match's step to its loss.

    Args:
        network: the student.
        synthetic: the set; on the device of `start`.
        batches: of the inner steps; N of them.
        start: theta_0 [P].
        matches: one at step N, and any at steps before it.
        momentum: of the student (AST: 0.9).
        loss_scale: times the inner loss (AST's balance).
        first_order: TESLA's gradient.
        all_reduce: as `Descent`'s, where `batches` are one worker's parts; the gradients of images
            and labels are then this worker's shares, to be added up.
    """
    images = synthetic.images.detach().requires_grad_()
    labels = synthetic.labels.detach().requires_grad_(synthetic.soft)
    leaves = [images, labels] if synthetic.soft else [images]
    given = SyntheticSet(images, labels, synthetic.learning_rate)
    loss = inner_loss(network, given, batches, loss_scale)
    descent = Descent(loss, synthetic.learning_rate, momentum, all_reduce)
    run = descend(descent, start, len(batches))
    objective = matching_objective(start, matches)
    return adjoint(descent, run.states, objective, leaves, first_order=first_order), run


def matching_objective(
    start: Tensor, matches: Sequence[Match]
) -> Callable[[int, Tensor], Tensor | None]:
    """The adjoint's objective: weighted matching losses at the matches' steps."""
    by_step = {match.step: match for match in matches}

    def objective(step: int, theta: Tensor) -> Tensor | None:
        match = by_step.get(step)
        return match and matching_loss(theta, start, match.target) * match.weight

    return objective
