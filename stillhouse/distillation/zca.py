"""ZCA whitening of images, as trajectory matching uses it instead of channel means.

    mu = mean of the columns of X [N, C*H*W],  Sigma = (X - mu)^T (X - mu) / (N - 1) = U diag(s) U^T
    W  = U diag((s + eps)^(-1/2)) U^T,         output (x - mu) W

with eps = 0.1 on pixels in [0, 1]. Fitted on the training images alone; experts and synthetic
images must both be whitened, or neither.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_EPS = 0.1


@dataclass(frozen=True, slots=True)
class Zca:
    """mu [D], W [D, D] and its inverse, for images of D = C*H*W values."""

    mean: Tensor
    matrix: Tensor
    inverse: Tensor

    def whiten(self, images: Tensor) -> Tensor:
        """Images [N, C, H, W] with pixels in [0, 1] to whitened ones."""
        return ((images.flatten(1) - self.mean) @ self.matrix).view_as(images)

    def restore(self, images: Tensor) -> Tensor:
        """Whitened images [N, C, H, W] back to pixels, to be looked at."""
        return (images.flatten(1) @ self.inverse + self.mean).view_as(images)


def fit_zca(images: Tensor, eps: float = _EPS) -> Zca:
    """The whitening of images [N, C, H, W]. Decomposed in float64: O(N D^2 + D^3)."""
    rows = images.flatten(1).double()
    mean = rows.mean(0)
    values, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean) / (len(rows) - 1))
    spread = (values.clamp(min=0) + eps).sqrt()
    matrix = (vectors / spread) @ vectors.T
    inverse = (vectors * spread) @ vectors.T
    return Zca(mean.to(images.dtype), matrix.to(images.dtype), inverse.to(images.dtype))
