"""The decoupled methods end to end: from teachers and real images to a labelled set and its bytes.

Each method is a list of units that know nothing of one another (SRe2L: a batch; INFER: a teacher
and an index; RDED: a class; NRR-DD: a class, then a batch). A unit draws from its own generator, so
that workers that share the units out make the same set as one that does them all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse.distillation.baselines import random_real
from stillhouse.distillation.compensators import CompensatedSet
from stillhouse.distillation.images import ImageSet
from stillhouse.distillation.infer import compensate, compensated_set
from stillhouse.distillation.labels import mean_logits
from stillhouse.distillation.nrr_dd import critical_patches, refine
from stillhouse.distillation.rded import distil_class
from stillhouse.distillation.settings import (
    CompensatorSettings,
    CriticalPatchSettings,
    PatchSettings,
    RecoverSettings,
    RefineSettings,
)
from stillhouse.distillation.sre2l import recover, recovery_batches
from stillhouse.distillation.standardise import Standardisation
from stillhouse.distillation.storage_budget import (
    StoredBytes,
    compensator_budget,
    hard_label_bytes,
    image_bytes,
    soft_label_bytes,
)


@dataclass(frozen=True, slots=True)
class RealImages:
    """The training images on a device.

    Attributes:
        images: standardised float32 [N, C, H, W].
        labels: int64 [N].
        num_classes: how many there are.
        standardisation: that of the images.
    """

    images: Tensor
    labels: Tensor
    num_classes: int
    standardisation: Standardisation

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        _, channels, height, width = self.images.shape
        return channels, height, width


@dataclass(frozen=True, slots=True)
class DistilledImages:
    """A distilled set as a network is trained on it.

    Attributes:
        images: standardised float32 [n, C, H, W], already rounded to what is stored.
        labels: int64 [n].
        label_logits: float16 [n, num_classes], static soft labels; None without.
        stored: what it costs to store.
    """

    images: Tensor
    labels: Tensor
    label_logits: Tensor | None
    stored: StoredBytes


def real_images(
    images: ImageSet, standardisation: Standardisation, device: torch.device
) -> RealImages:
    """A set of images, standardised, on a device."""
    pixels = standardisation.standardised(images).to(device)
    labels = torch.from_numpy(images.labels).to(device)
    return RealImages(pixels, labels, images.num_classes, standardisation)


def unit_generator(seed: int, *unit: int) -> np.random.Generator:
    """The generator of one unit of work, named by whole numbers."""
    return np.random.default_rng([seed, *unit])


def hard_labelled(images: Tensor, labels: Tensor, real: RealImages) -> DistilledImages:
    """8-bit images with their classes: standardised images are rounded to what is stored."""
    pixels = real.standardisation.to_bytes(images)
    stored = StoredBytes(
        image_bytes(len(images), real.shape), hard_label_bytes(len(images), real.num_classes)
    )
    return DistilledImages(real.standardisation.from_bytes(pixels), labels, None, stored)


def with_static_labels(
    distilled: DistilledImages, teachers: Sequence[nn.Module]
) -> DistilledImages:
    """The same images with the mean of the teachers' logits instead of classes."""
    logits = mean_logits(teachers, distilled.images).half()
    stored = StoredBytes(distilled.stored.images, soft_label_bytes(*logits.shape))
    return replace(distilled, label_logits=logits, stored=stored)


def sre2l(
    teacher: nn.Module,
    real: RealImages,
    *,
    images_per_class: int,
    settings: RecoverSettings,
    seed: int,
) -> DistilledImages:
    """SRe2L's images, batch after batch.

    Raises:
        DivergedError: the loss is NaN or infinite.
    """
    batches = recovery_batches(real.num_classes, images_per_class, settings.batch_size)
    batches = [labels.to(real.images.device) for labels in batches]
    images = [
        recover(
            teacher,
            labels,
            real.shape,
            settings,
            real.standardisation,
            rng=unit_generator(seed, unit),
        )[0]
        for unit, labels in enumerate(batches)
    ]
    return hard_labelled(torch.cat(images), torch.cat(batches), real)


def infer_real(real: RealImages, num_real: int, seed: int) -> list[Tensor]:
    """INFER's K real images of every class, random: K tensors [num_classes, C, H, W].

    Raises:
        InputError: a class has fewer images.
    """
    rows = random_real(real.labels.cpu().numpy(), num_real, seed=seed)
    by_index = torch.from_numpy(rows).view(real.num_classes, num_real).T
    return [real.images[index.to(real.images.device)] for index in by_index]


def infer(
    teachers: Sequence[nn.Module],
    real: RealImages,
    *,
    images_per_class: int,
    settings: CompensatorSettings,
    seed: int,
) -> tuple[DistilledImages, CompensatedSet]:
    """INFER's expanded set with static labels, and the two parts that are stored of it.

    Raises:
        BudgetError: `images_per_class` leaves no real image; InputError: a class has too few;
        DivergedError: the loss is NaN or infinite.
    """
    num_real = compensator_budget(images_per_class, len(teachers), real.num_classes).num_real
    chosen = infer_real(real, num_real, seed)
    classes = torch.arange(real.num_classes, device=real.images.device)
    compensators = [
        [
            compensate(teacher, images, classes, settings, rng=unit_generator(seed, m, k))[0]
            for k, images in enumerate(chosen)
        ]
        for m, teacher in enumerate(teachers)
    ]
    parts = compensated_set(chosen, compensators, real.standardisation)
    images = real.standardisation.from_bytes(parts.expand())
    logits = mean_logits(teachers, images).half()
    return DistilledImages(images, parts.labels, logits, parts.stored_bytes()), parts


def rded(
    teacher: nn.Module,
    real: RealImages,
    *,
    images_per_class: int,
    settings: PatchSettings,
    seed: int,
) -> DistilledImages:
    """RDED's stitched images, class after class.

    Raises:
        InputError: a class has fewer images than patches are needed.
    """
    images = [
        distil_class(
            teacher,
            real.images,
            real.labels,
            label,
            images_per_class=images_per_class,
            settings=settings,
            rng=unit_generator(seed, label),
        )
        for label in range(real.num_classes)
    ]
    classes = torch.arange(real.num_classes, device=real.images.device)
    return hard_labelled(torch.cat(images), classes.repeat_interleave(images_per_class), real)


def nrr_dd(
    teacher: nn.Module,
    real: RealImages,
    *,
    images_per_class: int,
    patches: CriticalPatchSettings,
    settings: RefineSettings,
    seed: int,
) -> DistilledImages:
    """NRR-DD's refined images, in batches of all classes as SRe2L's.

    Raises:
        InputError: a class has fewer images than patches are needed.
        DivergedError: the loss is NaN or infinite.
    """
    initial = [
        critical_patches(
            teacher,
            real.images,
            real.labels,
            label,
            images_per_class=images_per_class,
            settings=patches,
            rng=unit_generator(seed, label),
        )
        for label in range(real.num_classes)
    ]
    batches = recovery_batches(real.num_classes, images_per_class, settings.batch_size)
    batches = [labels.to(real.images.device) for labels in batches]
    in_turn = torch.stack(initial, 1).flatten(0, 1).split(settings.batch_size)
    images = [
        refine(teacher, images, labels, settings, real.standardisation)[0]
        for images, labels in zip(in_turn, batches, strict=True)
    ]
    return hard_labelled(torch.cat(images), torch.cat(batches), real)
