"""From pixels in [0, 1] to what networks see, and back to the 8 bits that are stored."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stillhouse.distillation.images import ImageSet

_SMALLEST_STD = 1 / 255  # of a channel that never changes


@dataclass(frozen=True, slots=True)
class Standardisation:
    """Per channel (pixel - mean) / std, pixels in [0, 1]; one number a channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def apply(self, pixels: Tensor) -> Tensor:
        """Pixels [..., C, H, W] in [0, 1] -> what a network is given."""
        mean, std = self._tensors(pixels)
        return (pixels - mean) / std

    def pixels(self, images: Tensor) -> Tensor:
        """The inverse of `apply`, not clipped."""
        mean, std = self._tensors(images)
        return images * std + mean

    def clip(self, images: Tensor) -> Tensor:
        """Standardised images [..., C, H, W] moved into the range of pixels."""
        mean, std = self._tensors(images)
        return torch.minimum(torch.maximum(images, -mean / std), (1 - mean) / std)

    def to_bytes(self, images: Tensor) -> Tensor:
        """Standardised images as uint8 pixels, rounded: what is stored."""
        return (self.pixels(images) * 255).round().clamp(0, 255).to(torch.uint8)

    def from_bytes(self, pixels: Tensor) -> Tensor:
        """uint8 pixels as standardised float32 images."""
        return self.apply(pixels.float() / 255)

    def standardised(self, images: ImageSet) -> Tensor:
        """All images of a set, float32 [N, C, H, W]."""
        return self.apply(torch.from_numpy(images.pixels()))

    def _tensors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, 1, 1)
        mean = torch.tensor(self.mean, dtype=like.dtype, device=like.device).view(shape)
        return mean, torch.tensor(self.std, dtype=like.dtype, device=like.device).view(shape)


def fit_standardisation(images: ImageSet) -> Standardisation:
    """Mean and biased standard deviation of each channel over all pixels of the training images."""
    means: list[float] = []
    stds: list[float] = []
    for channel in range(images.shape[0]):
        values = images.images[:, channel]
        means.append(float(values.mean(dtype=np.float64)) / 255)
        stds.append(max(float(values.std(dtype=np.float64)) / 255, _SMALLEST_STD))
    return Standardisation(tuple(means), tuple(stds))
