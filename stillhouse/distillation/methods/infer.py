"""INFER: one inter-class feature compensator for all classes, on top of real images.

For each teacher m and index k, with K real images x_{c,k} of every class c,

    u_{m,k} = argmin_u CE(f_m(roll(x_{c,k} + u)), c) + r_bn * (SRe2L's batch statistics),

all classes in one batch, u starting at 0. The set is {x_{c,k}} and {x_{c,k} + u_{m,k}}: K (M + 1)
images per class for the storage of K (1 + M / C) (Zhang et al. 2024). Labels are static: the mean
of the teachers' logits on each image.

Our choice: x is stored in 8 bits, u in 8 bits as multiples of 1/127 of the pixel range between -1
and 1; a larger u has no effect on x + u clipped to pixels. The saving exists only because x and u
are stored apart.
"""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from stillhouse.distillation.decoupled import (
    DecoupledMethod,
    ImageUnit,
    UnitMade,
    UnitWork,
    task_rng,
)
from stillhouse.distillation.methods.sre2l import MatchingSettings, matching_loss, minimise, roll
from stillhouse.distillation.prepared import Prepared
from stillhouse.distillation.preprocessing import Standardisation
from stillhouse.distillation.real_images import random_real
from stillhouse.distillation.recipes import ProtocolName
from stillhouse.distillation.spec import DistillSpec
from stillhouse.distillation.stored_sets import UNIT, CompensatedSet, LabelledSet, expanded_set
from stillhouse.errors import BudgetError, SpecError


class Infer(DecoupledMethod, MatchingSettings):
    """One compensator for all classes on top of real images (Zhang et al. 2024)."""

    protocol: ClassVar[ProtocolName] = "p2"

    statistics_weight: float = Field(default=1.0, ge=0, description="r_bn: 1 CIFAR, 0.01 ImageNet")

    def check_spec(self, spec: DistillSpec) -> None:
        if self.images_per_class < 2:
            raise SpecError(
                "`method.images_per_class: 1` leaves INFER no real image beside its compensators: "
                "at least 2 are needed, more where there are more `teachers` than classes"
            )

    def units(self, stage: str, num_teachers: int, num_classes: int) -> list[ImageUnit]:
        """One for each index of each teacher."""
        num_real = compensator_budget(self.images_per_class, num_teachers, num_classes)
        return [ImageUnit(k, m) for m in range(num_teachers) for k in range(num_real)]

    def make(self, work: UnitWork) -> UnitMade:
        """A compensator."""
        unit, prepared = work.unit, work.prepared
        images = self._real(prepared, unit.index + 1)[unit.index]
        classes = torch.arange(prepared.num_classes, device=prepared.device)
        rng = task_rng(self.seed, unit.teacher, unit.index)
        return compensate(work.teacher, images, classes, self, rng=rng)

    def assemble(
        self, prepared: Prepared, made: Sequence[Tensor], num_teachers: int
    ) -> LabelledSet:
        num_real, norm = len(made) // num_teachers, prepared.standardisation
        real = [images.cpu() for images in self._real(prepared, num_real)]
        by_teacher = [made[m * num_real : (m + 1) * num_real] for m in range(num_teachers)]
        return expanded_set(compensated_set(real, by_teacher, norm), norm.ranges)

    def _real(self, prepared: Prepared, num_real: int) -> list[Tensor]:
        """K random real images of every class: K tensors [num_classes, C, H, W]."""
        rows = random_real(prepared.train_labels.cpu().numpy(), num_real, seed=self.seed)
        by_index = torch.from_numpy(rows).view(prepared.num_classes, num_real).T
        return [prepared.train[index.to(prepared.device)] for index in by_index]


def compensate(
    teacher: nn.Module,
    images: Tensor,
    labels: Tensor,
    settings: MatchingSettings,
    *,
    rng: np.random.Generator,
) -> UnitMade:
    """u [1, C, H, W] for a real image of every class [num_classes, C, H, W], and the losses.

    x + u is not clipped while u is fitted.
    """
    compensator = torch.zeros_like(images[:1]).requires_grad_()

    def loss() -> Tensor:
        compensated = roll(images + compensator, settings.jitter, rng)
        return matching_loss(teacher, compensated, labels, settings.statistics_weight)

    losses = minimise(compensator, loss, settings)
    return compensator.detach(), losses


def compensated_set(
    real: Sequence[Tensor],
    compensators: Sequence[Sequence[Tensor]],
    standardisation: Standardisation,
) -> CompensatedSet:
    """Images and compensators, rounded as they are stored.

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


def compensator_budget(images_per_class: int, num_teachers: int, num_classes: int) -> int:
    """INFER's K = floor(IPC / (1 + M / C)) in integers: real images per class.

    Raises:
        BudgetError: K would be 0; names the smallest sufficient number of images per class.
    """
    num_real = images_per_class * num_classes // (num_classes + num_teachers)
    if num_real < 1:
        smallest = -(-(num_classes + num_teachers) // num_classes)
        raise BudgetError(
            f"`method.images_per_class: {images_per_class}` leaves INFER no real image: with "
            f"{num_teachers} teachers and {num_classes} classes at least {smallest} are needed "
            "(or fewer `teachers`)"
        )
    return num_real
