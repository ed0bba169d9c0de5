"""INFER: one inter-class feature compensator for all classes, on top of real images.

For each teacher m and index k, with K real images x_{c,k} of every class c,

    u_{m,k} = argmin_u CE(f_m(roll(x_{c,k} + u)), c) + r_bn * (SRe2L's batch statistics),

all classes in one batch, u starting at 0. The set is {x_{c,k}} and {x_{c,k} + u_{m,k}}: K (M + 1)
images per class for the storage of K (1 + M / C) (Zhang et al. 2024). Labels are static: the mean
of the teachers' logits on each image (`labels.mean_logits`).

Ours: what is stored. x is kept in 8 bits, u in 8 bits as multiples of 1/127 of the pixel range
between -1 and 1; more than that range x + u, clipped to pixels, cannot show. Only stored apart do
they save anything.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse.distillation.compensators import UNIT, CompensatedSet
from stillhouse.distillation.settings import CompensatorSettings
from stillhouse.distillation.sre2l import matching_loss, minimise, roll
from stillhouse.distillation.standardise import Standardisation


def compensate(
    teacher: nn.Module,
    images: Tensor,
    labels: Tensor,
    settings: CompensatorSettings,
    *,
    rng: np.random.Generator,
) -> tuple[Tensor, list[float]]:
    """u [1, C, H, W] for one real image of every class [num_classes, C, H, W], and the losses.

    The sum is not clipped while u is fitted, so that u is unconstrained.

    Raises:
        DivergedError: the loss is NaN or infinite.
    """
    compensator = torch.zeros_like(images[:1]).requires_grad_()

    def loss() -> Tensor:
        return compensator_loss(
            teacher, roll(images + compensator, settings.jitter, rng), labels, settings
        )

    losses = minimise(compensator, loss, settings)
    return compensator.detach(), losses


def compensator_loss(
    teacher: nn.Module, compensated: Tensor, labels: Tensor, settings: CompensatorSettings
) -> Tensor:
    """The module's objective on x + u, rolled or not: [num_classes, C, H, W] -> scalar."""
    return matching_loss(teacher, compensated, labels, settings.statistics_weight).total


def compensated_set(
    real: Sequence[Tensor],
    compensators: Sequence[Sequence[Tensor]],
    standardisation: Standardisation,
) -> CompensatedSet:
    """Round what was fitted to what is stored.

    Args:
        real: K standardised tensors [num_classes, C, H, W].
        compensators: for each of M teachers, K tensors [1, C, H, W] in standardised units.
        standardisation: of the images.
    """
    std = torch.tensor(standardisation.std, device=real[0].device).view(-1, 1, 1)
    in_pixels = torch.stack([torch.cat(list(of_one)) for of_one in compensators]) * std
    return CompensatedSet(
        torch.stack([standardisation.to_bytes(images) for images in real]),
        (in_pixels * UNIT).round().clamp(-UNIT, UNIT).to(torch.int8),
    )
