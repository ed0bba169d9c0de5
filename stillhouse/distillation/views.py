"""Augmented views of a set of images, drawn again from a seed: what labels are made on.

A training pass over a distilled set is a sequence of batches of views: crop, flip, then mixup or
CutMix with one partner and one weight for the whole batch (as SRe2L, RDED and INFER do). Labels
that a teacher gives to views are stored in the order of this sequence, so that a student meets the
very same views. Draws are made on the CPU, by a NumPy generator, whatever the device.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from stillhouse.distillation.recipes import ViewSettings


@dataclass(frozen=True, slots=True)
class Views:
    """One batch of B views.

    Attributes:
        images: [B, C, H, W].
        rows: int64 [B], which image each view is of.
        partners: int64 [B], which image it is mixed with.
        weight: the share of the image itself; 1 without mixing. For CutMix the share of the area
            that was really kept, which is more than the one drawn where the box meets the border.
        epoch: counted from 0.
        start: the place of the first view in its epoch.
    """

    images: Tensor
    rows: Tensor
    partners: Tensor
    weight: float
    epoch: int
    start: int

    @property
    def span(self) -> slice:
        """The places of the views in their epoch."""
        return slice(self.start, self.start + len(self.rows))


def epoch_views(
    images: Tensor, settings: ViewSettings, *, batch_size: int, seed: int, epoch: int
) -> Iterator[Views]:
    """Every image [N, C, H, W] once, in a random order; the same arguments give the same views."""
    rng = np.random.default_rng([seed, epoch])
    order = torch.from_numpy(rng.permutation(len(images)))
    for start in range(0, len(images), batch_size):
        rows = order[start : start + batch_size]
        batch = crop_and_flip(images[rows.to(images.device)], settings, rng)
        batch, partner, weight = mix(batch, settings, rng)
        yield Views(batch, rows, rows[partner], weight, epoch, start)


def crop_and_flip(images: Tensor, settings: ViewSettings, rng: np.random.Generator) -> Tensor:
    """Shuffled tiles, crop and flip, drawn for each image [B, C, H, W]."""
    if settings.patches > 1:
        images = shuffle_patches(images, settings.patches, rng)
    if settings.crop == "pad":
        images = padded_crop(images, rng)
    elif settings.crop == "resized":
        images = resized_crop(images, settings.min_scale, rng)
    if settings.flip:
        flipped = torch.from_numpy(rng.random(len(images)) < 0.5).to(images.device)
        images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
    return images


def mix(
    images: Tensor, settings: ViewSettings, rng: np.random.Generator
) -> tuple[Tensor, Tensor, float]:
    """Mixed images, each one's partner int64 [B] in the batch, and the weight of the image."""
    if settings.mix == "none":
        return images, torch.arange(len(images)), 1.0
    partner = torch.from_numpy(rng.permutation(len(images)))
    weight = float(rng.beta(settings.mix_beta, settings.mix_beta))
    if settings.mix == "mixup":
        return mixup(images, partner, weight), partner, weight
    height, width = images.shape[-2:]
    centre = int(rng.integers(height)), int(rng.integers(width))
    box = cutmix_box((height, width), weight, centre)
    area = (box[2] - box[0]) * (box[3] - box[1])
    return cutmix(images, partner, box), partner, 1 - area / (height * width)


def mixup(images: Tensor, partner: Tensor, weight: float) -> Tensor:
    """weight * x_i + (1 - weight) * x_partner(i); images or labels [B, ...]."""
    return weight * images + (1 - weight) * images[partner.to(images.device)]


Box = tuple[int, int, int, int]
"""Half-open rows [top, bottom) and columns [left, right): top, left, bottom, right."""


def cutmix_box(size: tuple[int, int], weight: float, centre: tuple[int, int]) -> Box:
    """A box of 1 - weight of the area of (height, width) around a centre, cut at the border.

    Sides are rounded down, and so are their halves (Yun et al. 2019).
    """
    half = [int(side * np.sqrt(1 - weight)) // 2 for side in size]
    low = [max(c - h, 0) for c, h in zip(centre, half, strict=True)]
    high = [min(c + h, side) for c, h, side in zip(centre, half, size, strict=True)]
    return low[0], low[1], high[0], high[1]


def cutmix(images: Tensor, partner: Tensor, box: Box) -> Tensor:
    """A copy of the images [B, C, H, W] with the partner's pixels inside the box."""
    mixed = images.clone()
    top, left, bottom, right = box
    inside = (..., slice(top, bottom), slice(left, right))
    mixed[inside] = images[partner.to(images.device)][inside]
    return mixed


def padded_crop(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Each image moved by up to an eighth of its side (4 of 32) in both directions, into zeros."""
    height, width = images.shape[-2:]
    pad = height // 8
    padded = functional.pad(images, [pad] * 4)
    corners = rng.integers(0, 2 * pad + 1, (len(images), 2)).tolist()
    moved = [p[:, y : y + height, x : x + width] for p, (y, x) in zip(padded, corners, strict=True)]
    return torch.stack(moved)


def resized_crop(images: Tensor, min_scale: float, rng: np.random.Generator) -> Tensor:
    """A random part of each image at full size: area share U(min_scale, 1), aspect 3/4 to 4/3."""
    share = rng.uniform(min_scale, 1, len(images))
    aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), len(images)))
    sides = np.stack([np.sqrt(share * aspect), np.sqrt(share / aspect)], 1).clip(max=1)
    offset = (1 - sides) * rng.uniform(-1, 1, (len(images), 2))
    theta = np.zeros((len(images), 2, 3), np.float32)
    theta[:, [0, 1], [0, 1]], theta[:, :, 2] = sides, offset
    grid = functional.affine_grid(
        torch.from_numpy(theta).to(images), list(images.shape), align_corners=False
    )
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def shuffle_patches(images: Tensor, patches: int, rng: np.random.Generator) -> Tensor:
    """The columns of tiles of each image, then the rows, in a random order.

    A last column or row takes what the division leaves over, as the stitched tiles do not: images
    whose side is no multiple of `patches` are mixed at slightly moved borders.
    """
    for dim in (-1, -2):
        side = images.shape[dim]
        bounds = [i * (side // patches) for i in range(patches)] + [side]
        tiles = [np.arange(a, b) for a, b in pairwise(bounds)]
        orders = [np.concatenate([tiles[i] for i in rng.permutation(patches)]) for _ in images]
        index = torch.from_numpy(np.stack(orders)).to(images.device)
        index = index[:, None, None, :] if dim == -1 else index[:, None, :, None]
        images = images.gather(dim, index.expand(images.shape))
    return images
