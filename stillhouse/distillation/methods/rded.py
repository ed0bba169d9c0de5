"""RDED: no optimisation; the patches of real images that a teacher is surest of, stitched together.

Per class: random square crops of each real image, scored by the teacher's cross-entropy with the
class (padded with zeros to full size); the best crop of each image, then the images of lowest
loss, factor x factor of them to an image (Sun et al. 2024, section 4).
"""

from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from stillhouse.distillation.decoupled import DecoupledMethod, UnitMade, UnitWork, task_rng
from stillhouse.distillation.evaluate import BATCH
from stillhouse.errors import InputError
from stillhouse.spec import Count, Settings


class PatchSettings(Settings):
    """How patches are cut and chosen."""

    factor: Count = Field(default=1, description="factor x factor patches to an image; 2 from 128")
    num_crops: Count = Field(default=5, description="tried of each real image")
    num_candidates: Count = Field(default=300, description="real images of a class looked at")
    min_scale: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.08, description="smallest share of an image's area that a crop may cover"
    )

    @property
    def patches_per_side(self) -> int:
        return self.factor


class Rded(PatchSettings, DecoupledMethod):
    """The patches of real images that a teacher is surest of (Sun et al. 2024)."""

    def make(self, work: UnitWork) -> UnitMade:
        """The images of a class."""
        label, prepared, count = work.unit.index, work.prepared, self.images_per_class
        images, labels, rng = prepared.train, prepared.train_labels, task_rng(self.seed, label)
        return sure_patches(work.teacher, images, labels, label, count, self, rng), []


def sure_patches(
    teacher: nn.Module,
    images: Tensor,
    labels: Tensor,
    label: int,
    images_per_class: int,
    settings: PatchSettings,
    rng: np.random.Generator,
) -> Tensor:
    """RDED's images of one class [images_per_class, C, H, H], out of real ones [N, C, H, H].

    Raises:
        InputError: the class has fewer images than patches are needed.
    """
    count = images_per_class * settings.factor**2
    rows = draw_candidates(labels, label, settings, count, rng).to(images.device)
    patches, _ = draw_crops(images[rows], settings, rng)
    side = images.shape[-1]
    losses = -patch_log_probs(teacher, patches, side)[..., label]
    return stitch(select_patches(patches, losses, count), settings.factor, side)


def draw_candidates(
    labels: Tensor, label: int, settings: PatchSettings, count: int, rng: np.random.Generator
) -> Tensor:
    """Rows of up to `num_candidates` random images of a class: int64 [n], n at least `count`.

    Raises:
        InputError: the class has fewer than `count` images.
    """
    rows = np.flatnonzero(labels.cpu().numpy() == label)
    if len(rows) < count:
        raise InputError(
            f"class {label} has {len(rows)} training images, {count} patches of different ones "
            "are needed: lower `method.images_per_class` or `method.factor`"
        )
    wanted = max(settings.num_candidates, count)
    return torch.from_numpy(rng.permutation(rows)[:wanted])


def draw_crops(
    images: Tensor, settings: PatchSettings, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Random square crops of images [n, C, H, H], resized to H // factor with antialiasing.

    Returns patches [n, num_crops, C, h, w] and their boxes int64 [n, num_crops, 3], each (top,
    left, side) in its image.
    """
    count, side = len(images), images.shape[-1]
    shape = (count, settings.num_crops)
    sides = np.rint(side * np.sqrt(rng.uniform(settings.min_scale, 1, shape))).clip(1, side)
    corners = np.floor(rng.random((*shape, 2)) * (side - sides[..., None] + 1))
    boxes = torch.from_numpy(np.concatenate([corners, sides[..., None]], -1).astype(np.int64))
    small = side // settings.factor
    patches = [
        _resized(image[:, top : top + length, left : left + length], small)
        for image, of_image in zip(images, boxes.tolist(), strict=True)
        for top, left, length in of_image
    ]
    return torch.stack(patches).unflatten(0, shape), boxes


def _resized(patch: Tensor, side: int) -> Tensor:
    if patch.shape[-1] == side:
        return patch
    return functional.interpolate(
        patch[None], (side, side), mode="bilinear", antialias=True, align_corners=False
    )[0]


def centred(patches: Tensor, side: int) -> Tensor:
    """Patches [..., h, w] padded with zeros to [..., side, side]."""
    height, width = patches.shape[-2:]
    top, left = (side - height) // 2, (side - width) // 2
    return functional.pad(patches, [left, side - width - left, top, side - height - top])


@torch.no_grad()
def patch_log_probs(teacher: nn.Module, patches: Tensor, side: int) -> Tensor:
    """Log-probabilities of padded patches: [n, num_crops, C, h, w] -> [n, num_crops, K]."""
    padded = centred(patches.flatten(0, 1), side)
    logits = torch.cat([teacher(batch) for batch in padded.split(BATCH)])
    return logits.log_softmax(1).unflatten(0, patches.shape[:2])


def select_patches(patches: Tensor, scores: Tensor, count: int) -> Tensor:
    """The best crop of the `count` images of lowest score, lowest first: [count, C, h, w].

    Scores [n, num_crops]; ties go to the first crop and the first image.
    """
    best = torch.from_numpy(scores.cpu().numpy().argmin(1)).to(patches.device)
    rows = torch.arange(len(patches), device=patches.device)
    lowest = scores.to(patches.device)[rows, best].argsort(stable=True)[:count]
    return patches[lowest, best[lowest]]


def stitch(patches: Tensor, factor: int, side: int) -> Tensor:
    """factor^2 * n patches [.., C, h, w] -> n images [n, C, side, side].

    Tile k of image i, row by row, is patch k * n + i. Where factor does not divide the side, the
    first rows and columns of tiles are one pixel larger (nearest neighbour).
    """
    if factor == 1:
        return patches
    count = len(patches) // factor**2
    sides = [side // factor + (i < side % factor) for i in range(factor)]
    tiles = iter(patches.split(count))
    rows = [
        torch.cat([functional.interpolate(next(tiles), (height, width)) for width in sides], -1)
        for height in sides
    ]
    return torch.cat(rows, -2)
