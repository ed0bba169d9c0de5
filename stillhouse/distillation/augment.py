"""Differentiable Siamese augmentation (Zhao & Bilen 2021), with the draws apart from the images.

A call draws one of six groups for the whole batch and, inside it, own numbers for each image. The
draws are kept, so that the adjoint's second pass sees the images that the first one saw.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import pi

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from stillhouse.distillation.recipes import Group

_SCALE = 1.2
_ROTATION = 15 * pi / 180
_CROP = 0.125  # of the height
_CUTOUT = 0.5


@dataclass(frozen=True, slots=True)
class AugmentDraw:
    """One call's group and numbers [k, B].

    color: u in [0, 1) for brightness, saturation and contrast; flip: u; crop: shift of rows and of
    columns in pixels; cutout: centre's row and column; scale: factors of x and y; rotate: radians.
    """

    group: Group
    values: Tensor

    def part(self, rows: slice) -> "AugmentDraw":
        """The draws of some of the batch's images."""
        return AugmentDraw(self.group, self.values[:, rows])


def draw_augmentation(
    groups: Sequence[Group], batch_size: int, image_size: int, generator: torch.Generator
) -> AugmentDraw:
    """Draw a group uniformly and its numbers for `batch_size` images of `image_size` pixels."""
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
    """Images [B, C, H, W] to augmented ones; differentiable in the images."""
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
    """Distance to the pixel's mean over channels times 2u."""
    mean = images.mean(1, keepdim=True)
    return (images - mean) * (2 * uniform[:, None, None, None]) + mean


def contrast(images: Tensor, uniform: Tensor) -> Tensor:
    """Distance to the image's mean times u + 0.5."""
    mean = images.mean((1, 2, 3), keepdim=True)
    return (images - mean) * (uniform[:, None, None, None] + 0.5) + mean


def flip(images: Tensor, uniform: Tensor) -> Tensor:
    """Left to right where u < 0.5."""
    return torch.where(uniform[:, None, None, None] < 0.5, images.flip(3), images)


def crop(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Pixel (i, j) becomes (i + rows, j + columns); zeros enter from outside."""
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
    """A square of half the height becomes zero; outside the image it has no effect."""
    height, width = images.shape[2:]
    side = int(height * _CUTOUT + 0.5)
    row = torch.arange(height, device=images.device) - rows[:, None] + side // 2
    column = torch.arange(width, device=images.device) - columns[:, None] + side // 2
    return images * ~_box((row >= 0) & (row < side), (column >= 0) & (column < side))


def scale(images: Tensor, x_factor: Tensor, y_factor: Tensor) -> Tensor:
    """Bilinear about the centre; a factor below 1 enlarges; zeros enter from outside."""
    zero = torch.zeros_like(x_factor)
    return _affine(images, [x_factor, zero, zero, zero, y_factor, zero])


def rotate(images: Tensor, angle: Tensor) -> Tensor:
    """Bilinear about the centre by radians [B]; zeros enter from outside."""
    zero = torch.zeros_like(angle)
    cosine, sine = angle.cos(), angle.sin()
    return _affine(images, [cosine, -sine, zero, sine, cosine, zero])


def _affine(images: Tensor, entries: list[Tensor]) -> Tensor:
    grid = affine_grid(
        torch.stack(entries, 1).view(-1, 2, 3), list(images.shape), align_corners=True
    )
    return grid_sample(images, grid, align_corners=True)


def _box(rows: Tensor, columns: Tensor) -> Tensor:
    """True where both are: rows [B, H] and columns [B, W] -> [B, 1, H, W]."""
    return (rows[:, :, None] & columns[:, None, :])[:, None]
