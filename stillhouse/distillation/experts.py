"""Expert trajectories: a network trained on real images, its parameters kept after each epoch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from stillhouse.distillation.ast import (
    PENALTY_WEIGHT,
    RAMP_EPOCHS,
    clip_factor,
    gradient_penalty,
)
from stillhouse.distillation.augment import DSA_GROUPS, Group, augment, draw_augmentation
from stillhouse.distillation.flat import gsam_direction
from stillhouse.distillation.functional import FlatModule
from stillhouse.errors import DivergedError


@dataclass(frozen=True, slots=True)
class ExpertOptions:
    """How experts are trained. Defaults are MTT's; `AST_EXPERT` and `FTD_EXPERT` are the others'.

    Attributes:
        num_epochs: passes over the images.
        batch_size: the last batch of an epoch may be smaller.
        learning_rate: of SGD.
        momentum: heavy ball.
        weight_decay: L2, added to the gradient.
        drop_epoch: from it on the rate is times `drop_factor`, the momentum starts afresh.
        augmentation: DSA groups, one drawn a batch; none: plain images.
        ramp_epochs: of AST's clipping loss (`clip_factor`); 0: the whole loss from the start.
        penalty_weight: of AST's `gradient_penalty`, on the plain images; 0: none.
        rho: radius of FTD's flat steps (`gsam_direction`); None: plain gradients.
        alpha: of the flat steps.
    """

    num_epochs: int = 50
    batch_size: int = 256
    learning_rate: float = 0.01
    momentum: float = 0.0
    weight_decay: float = 0.0
    drop_epoch: int | None = None
    drop_factor: float = 0.1
    augmentation: tuple[Group, ...] = DSA_GROUPS
    ramp_epochs: int = 0
    penalty_weight: float = 0.0
    rho: float | None = None
    alpha: float = 0.4


AST_EXPERT = ExpertOptions(
    learning_rate=0.003,
    momentum=0.9,
    weight_decay=1e-3,
    drop_epoch=26,
    drop_factor=0.6,
    ramp_epochs=RAMP_EPOCHS,
    penalty_weight=PENALTY_WEIGHT,
)
FTD_EXPERT = ExpertOptions(rho=0.01)


@dataclass(frozen=True, slots=True)
class ExpertSnapshot:
    """Parameters [P] after `epoch` epochs (0: the start) and the last one's mean training loss."""

    epoch: int
    parameters: Tensor
    loss: float | None


def train_expert(
    network: FlatModule,
    images: Tensor,
    labels: Tensor,
    options: ExpertOptions,
    generator: torch.Generator,
) -> Iterator[ExpertSnapshot]:
    """Train from the module's own parameters; yields the start and then every epoch's end.

    Args:
        network: on the images' device.
        images: preprocessed, [N, C, H, W].
        labels: classes, [N].
        options: how.
        generator: of the CPU; draws the order and the augmentation.

    Raises:
        DivergedError: an epoch's loss is NaN or infinite.
    """
    theta = network.parameters()
    velocity = torch.zeros_like(theta)
    yield ExpertSnapshot(0, theta, None)
    for epoch in range(options.num_epochs):
        rate = options.learning_rate
        if options.drop_epoch is not None and epoch >= options.drop_epoch:
            rate *= options.drop_factor
            velocity = velocity * (epoch != options.drop_epoch)
        total = torch.zeros((), device=images.device)
        order = torch.randperm(len(images), generator=generator)
        for rows in order.to(images.device).split(options.batch_size):
            loss_at = expert_loss(network, images[rows], labels[rows], epoch, options, generator)
            direction, loss = _direction(loss_at, theta, options)
            velocity = options.momentum * velocity + direction + options.weight_decay * theta
            theta = theta - rate * velocity
            total += loss * len(rows)
        mean = float(total) / len(images)
        if not torch.isfinite(theta).all():
            raise DivergedError(
                f"an expert's loss is {mean} in epoch {epoch + 1} at learning rate {rate:.3g}: "
                "lower `experts.learning_rate`"
            )
        yield ExpertSnapshot(epoch + 1, theta, mean)


def expert_loss(
    network: FlatModule,
    images: Tensor,
    labels: Tensor,
    epoch: int,
    options: ExpertOptions,
    generator: torch.Generator,
) -> Callable[[Tensor], Tensor]:
    """A batch's training loss as a function of theta [P]; its augmentation is drawn once."""
    seen = images
    if options.augmentation:
        size = images.shape[2]
        seen = augment(
            images, draw_augmentation(options.augmentation, len(images), size, generator)
        )
    factor = clip_factor(epoch, options.ramp_epochs)

    def loss_at(theta: Tensor) -> Tensor:
        loss = factor * cross_entropy(network(theta, seen), labels)
        if not options.penalty_weight:
            return loss
        return loss + gradient_penalty(
            lambda inputs: network(theta, inputs), images, options.penalty_weight
        )

    return loss_at


def _direction(
    loss_at: Callable[[Tensor], Tensor], theta: Tensor, options: ExpertOptions
) -> tuple[Tensor, Tensor]:
    """What to step against, and the loss at theta."""
    losses: list[Tensor] = []

    def gradient_at(point: Tensor) -> Tensor:
        leaf = point.detach().requires_grad_()
        loss = loss_at(leaf)
        losses.append(loss.detach())
        return torch.autograd.grad(loss, leaf)[0]

    if options.rho is None:
        return gradient_at(theta), losses[0]
    return gsam_direction(gradient_at, theta, rho=options.rho, alpha=options.alpha), losses[0]
