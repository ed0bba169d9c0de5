"""Random augmentation of images: DSA for trajectory matching, views for training on a set.

DSA (differentiable Siamese augmentation, Zhao & Bilen 2021) draws one of six groups for a batch
and numbers for each image in it. Draws are separate from the images, so that the adjoint's
second pass sees the images of the first one.

A training pass over a set is a sequence of batches of views: crop and flip, then mixup or CutMix
with one partner and one weight a batch (as SRe2L, RDED and INFER do). Views are drawn from a seed
by a NumPy generator on the CPU, so that stored labels of views meet the same views again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import pi

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from stillhouse.distillation.recipes import Group, ViewSettings

_SCALE = 1.2
_ROTATION = 15 * pi / 180
_CROP = 0.125  # of the height
_CUTOUT = 0.5


@dataclass(frozen=True, slots=True)
class AugmentDraw:
    """A group and its numbers [k, B].

    color: u in [0, 1) for brightness, saturation and contrast; flip: u; crop: shift of rows and
    columns in pixels; cutout: row and column of the centre; scale: factors of x and y; rotate:
    radians.
    """

    group: Group
    values: Tensor

    def part(self, rows: slice) -> "AugmentDraw":
        return AugmentDraw(self.group, self.values[:, rows])


def draw_augmentation(
    groups: Sequence[Group], batch_size: int, image_size: int, generator: torch.Generator
) -> AugmentDraw:
    group = groups[int(torch.randint(len(groups), (), generator=generator))]
    if group in ("crop", "cutout"):
        shift, side = int(image_size * _CROP + 0.5), int(image_size * _CUTOUT + 0.5)
        low, high = (-shift, shift + 1) if group == "crop" else (0, image_size + 1 - side % 2)
        return AugmentDraw(group, torch.randint(low, high, (2, batch_size), generator=generator))
    count = {"color": 3, "flip": 1, "scale": 2, "rotate": 1}[group]
    uniform = torch.rand(count, batch_size, generator=generator)
    if group == "scale":
        uniform = uniform * (_SCALE - 1 / _SCALE) + 1 / _SCALE
    elif group == "rotate":
        uniform = (uniform - 0.5) * 2 * _ROTATION
    return AugmentDraw(group, uniform)


def augment(images: Tensor, draw: AugmentDraw) -> Tensor:
    """Augmented images [B, C, H, W], differentiable in the images."""
    values = draw.values.to(images.device)
    if values.is_floating_point():
        values = values.to(images.dtype)
    if draw.group == "color":
        return contrast(saturation(brightness(images, values[0]), values[1]), values[2])
    operate = {"flip": flip, "crop": crop, "cutout": cutout, "scale": scale, "rotate": rotate}
    return operate[draw.group](images, *values)


def brightness(images: Tensor, uniform: Tensor) -> Tensor:
    """x + (u - 0.5)."""
    return images + (uniform[:, None, None, None] - 0.5)


def saturation(images: Tensor, uniform: Tensor) -> Tensor:
    """Scales each pixel's distance to its mean over channels by 2u."""
    mean = images.mean(1, keepdim=True)
    return (images - mean) * (2 * uniform[:, None, None, None]) + mean


def contrast(images: Tensor, uniform: Tensor) -> Tensor:
    """Scales the distance to the image's mean by u + 0.5."""
    mean = images.mean((1, 2, 3), keepdim=True)
    return (images - mean) * (uniform[:, None, None, None] + 0.5) + mean


def flip(images: Tensor, uniform: Tensor) -> Tensor:
    """Mirrored where u < 0.5."""
    return torch.where(uniform[:, None, None, None] < 0.5, images.flip(3), images)


def crop(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Pixel (i, j) is taken from (i + rows, j + columns); zeros outside the image."""
    height, width = images.shape[2:]
    row = torch.arange(height, device=images.device) + rows[:, None]
    column = torch.arange(width, device=images.device) + columns[:, None]
    inside = _box((row >= 0) & (row < height), (column >= 0) & (column < width))
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    taken = images.movedim(1, 3)[
        batch, row.clamp(0, height - 1)[:, :, None], column.clamp(0, width - 1)[:, None, :]
    ]
    return taken.movedim(3, 1) * inside


def cutout(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Zeroes a square of half the height, cut off at the border."""
    height, width = images.shape[2:]
    side = int(height * _CUTOUT + 0.5)
    row = torch.arange(height, device=images.device) - rows[:, None] + side // 2
    column = torch.arange(width, device=images.device) - columns[:, None] + side // 2
    return images * ~_box((row >= 0) & (row < side), (column >= 0) & (column < side))


def scale(images: Tensor, x_factor: Tensor, y_factor: Tensor) -> Tensor:
    """Bilinear about the centre; a factor below 1 enlarges; zeros outside the image."""
    zero = torch.zeros_like(x_factor)
    return _affine(images, [x_factor, zero, zero, zero, y_factor, zero])


def rotate(images: Tensor, angle: Tensor) -> Tensor:
    """Bilinear about the centre by radians [B]; zeros outside the image."""
    zero = torch.zeros_like(angle)
    cosine, sine = angle.cos(), angle.sin()
    return _affine(images, [cosine, -sine, zero, sine, cosine, zero])


def _affine(images: Tensor, entries: list[Tensor]) -> Tensor:
    if not len(images):  # a worker without rows of a small batch; PyTorch refuses empty grids
        return images
    theta = torch.stack(entries, 1).view(-1, 2, 3)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=True)
    return functional.grid_sample(images, grid, align_corners=True)


def _box(rows: Tensor, columns: Tensor) -> Tensor:
    """Masks of rows [B, H] and columns [B, W] -> their intersection [B, 1, H, W]."""
    return (rows[:, :, None] & columns[:, None, :])[:, None]


@dataclass(frozen=True, slots=True)
class Views:
    """One batch of B views.

    Attributes:
        images: [B, C, H, W].
        rows: int64 [B], index of the image that each view shows.
        partners: int64 [B], index of the image that is mixed in.
        weight: share of the image itself, 1 without mixing. For CutMix the share of the area that
            was kept, more than the one drawn where the box is cut off at the border.
        epoch: counted from 0.
        start: position of the first view in its epoch.
    """

    images: Tensor
    rows: Tensor
    partners: Tensor
    weight: float
    epoch: int
    start: int

    @property
    def span(self) -> slice:
        """Positions of the views in their epoch."""
        return slice(self.start, self.start + len(self.rows))


def epoch_views(
    images: Tensor, settings: ViewSettings, *, batch_size: int, seed: int, epoch: int
) -> Iterator[Views]:
    """Every image [N, C, H, W] once, in a random order fixed by the arguments."""
    rng = np.random.default_rng([seed, epoch])
    order = torch.from_numpy(rng.permutation(len(images)))
    for start in range(0, len(images), batch_size):
        rows = order[start : start + batch_size]
        batch = crop_and_flip(images[rows.to(images.device)], settings, rng)
        batch, partner, weight = mix(batch, settings, rng)
        yield Views(batch, rows, rows[partner], weight, epoch, start)


def crop_and_flip(images: Tensor, settings: ViewSettings, rng: np.random.Generator) -> Tensor:
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
    """Mixed images, partners int64 [B] within the batch, and the weight of the image itself."""
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
    """A box of 1 - weight of the area around a centre, cut off at the border (Yun et al. 2019).

    Sides and their halves are rounded down.
    """
    half = [int(side * np.sqrt(1 - weight)) // 2 for side in size]
    low = [max(c - h, 0) for c, h in zip(centre, half, strict=True)]
    high = [min(c + h, side) for c, h, side in zip(centre, half, size, strict=True)]
    return low[0], low[1], high[0], high[1]


def cutmix(images: Tensor, partner: Tensor, box: Box) -> Tensor:
    """A copy of the images with the partner's pixels inside the box."""
    mixed = images.clone()
    top, left, bottom, right = box
    inside = (..., slice(top, bottom), slice(left, right))
    mixed[inside] = images[partner.to(images.device)][inside]
    return mixed


def padded_crop(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Random crops of the images padded with zeros by an eighth of their side (4 of 32)."""
    height, width = images.shape[-2:]
    pad = height // 8
    padded = functional.pad(images, [pad] * 4)
    corners = rng.integers(0, 2 * pad + 1, (len(images), 2)).tolist()
    moved = [p[:, y : y + height, x : x + width] for p, (y, x) in zip(padded, corners, strict=True)]
    return torch.stack(moved)


def resized_crop(images: Tensor, min_scale: float, rng: np.random.Generator) -> Tensor:
    """A random part of each image, resized: area share U(min_scale, 1), aspect 3/4 to 4/3."""
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
    """Shuffles each image's columns of tiles, then its rows of tiles.

    The last column or row takes the remainder of the division; stitched images (`rded.stitch`)
    have it in the first ones, so that borders differ by a pixel.
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
