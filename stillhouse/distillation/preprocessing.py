"""Preprocessing of samples: standardised, or whitened by ZCA.

Images are standardised (mean and deviation a channel) or whitened by ZCA, as trajectory matching
uses it:

    mu = mean of the columns of X [N, C*H*W],  Sigma = (X - mu)^T (X - mu) / (N - 1) = U diag(s) U^T
    W  = U diag((s + eps)^(-1/2)) U^T,         output (x - mu) W

with eps = 0.1 on pixels in [0, 1]. Both are fitted on the training images alone; experts and
synthetic images must both be whitened, or neither.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stillhouse.distillation.images import ImageSet
from stillhouse.distillation.stored_sets import LEVELS, Ranges

_SMALLEST_STD = 1 / 255  # of a constant channel
_ZCA_EPS = 0.1


@dataclass(frozen=True, slots=True)
class Standardisation:
    """(pixel - mean) / std of each channel, pixels in [0, 1]; tokens stay as they are.

    Attributes:
        mean, std: of each channel of images, or value of vectors.
        trailing: dimensions behind that of the channels: 2 of images, 0 of vectors.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    trailing: int = 2

    def apply(self, pixels: Tensor) -> Tensor:
        if not self.mean:
            return pixels
        mean, std = self._tensors(pixels)
        return (pixels - mean) / std

    def pixels(self, images: Tensor) -> Tensor:
        """The inverse of `apply`, not clipped."""
        mean, std = self._tensors(images)
        return images * std + mean

    def clip(self, images: Tensor) -> Tensor:
        """Standardised images [..., C, H, W], clipped to the range of pixels."""
        mean, std = self._tensors(images)
        return torch.minimum(torch.maximum(images, -mean / std), (1 - mean) / std)

    def to_bytes(self, images: Tensor) -> Tensor:
        """Standardised images as rounded uint8 pixels."""
        return (self.pixels(images) * 255).round().clamp(0, 255).to(torch.uint8)

    @property
    def ranges(self) -> Ranges:
        """Standardised value of level 0 and step of a level, for pixels of 8 bits."""
        return tuple((-m / s, 1 / (LEVELS * s)) for m, s in zip(self.mean, self.std, strict=True))

    def tensors(self) -> dict[str, Tensor]:
        return {"mean": torch.tensor(self.mean), "std": torch.tensor(self.std)}

    def _tensors(self, like: Tensor) -> list[Tensor]:
        return [
            torch.tensor(values, dtype=like.dtype, device=like.device).view(
                -1, *[1] * self.trailing
            )
            for values in (self.mean, self.std)
        ]


def fit_standardisation(images: ImageSet) -> Standardisation:
    """Mean and biased standard deviation of each channel over all pixels, or of each value."""
    values = images.images
    if values.dtype != np.uint8:
        if not np.issubdtype(values.dtype, np.floating):
            return Standardisation((), (), 0)
        mean, std = values.mean(0, dtype=np.float64), values.std(0, dtype=np.float64)
        return Standardisation(tuple(mean.tolist()), tuple(np.where(std > 0, std, 1).tolist()), 0)
    channels = [images.images[:, channel] for channel in range(images.shape[0])]
    means = [float(values.mean(dtype=np.float64)) / 255 for values in channels]
    stds = [float(values.std(dtype=np.float64)) / 255 for values in channels]
    return Standardisation(tuple(means), tuple(max(std, _SMALLEST_STD) for std in stds))


@dataclass(frozen=True, slots=True)
class Zca:
    """mu [D], W [D, D] and its inverse, for images of D = C*H*W values."""

    mean: Tensor
    matrix: Tensor
    inverse: Tensor

    def apply(self, pixels: Tensor) -> Tensor:
        return ((pixels.flatten(1) - self.mean) @ self.matrix).view_as(pixels)

    def pixels(self, images: Tensor) -> Tensor:
        """The inverse of `apply`."""
        mean, inverse = self.mean.to(images), self.inverse.to(images)
        return (images.flatten(1) @ inverse + mean).view_as(images)

    def tensors(self) -> dict[str, Tensor]:
        return {"mean": self.mean, "matrix": self.matrix, "inverse": self.inverse}


def fit_zca(images: Tensor, eps: float = _ZCA_EPS) -> Zca:
    """The whitening of images [N, C, H, W], decomposed in float64: O(N D^2 + D^3)."""
    rows = images.flatten(1).double()
    mean = rows.mean(0)
    values, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean) / (len(rows) - 1))
    spread = (values.clamp(min=0) + eps).sqrt()
    matrix, inverse = (vectors / spread) @ vectors.T, (vectors * spread) @ vectors.T
    return Zca(mean.to(images.dtype), matrix.to(images.dtype), inverse.to(images.dtype))
