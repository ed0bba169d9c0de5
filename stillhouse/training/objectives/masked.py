"""Masked autoencoding of images (He et al. 2022, arXiv 2111.06377): a teacher without labels.

A vision transformer reads the patches that are left, a small decoder predicts the others. The loss
is the mean squared error of the hidden patches, each normalised over its pixels.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse.classification.learner import ROWS, ClassifierFacts
from stillhouse.errors import SpecError
from stillhouse.models.vit import Vit, VitBlock
from stillhouse.training.objectives import LossValue
from stillhouse.training.objectives.bounds import positive
from stillhouse.training.objectives.distil import promoted

_MASKS = 14  # first word of a random generator's key


def patch_errors(predicted: Tensor, patches: Tensor) -> Tensor:
    """Mean squared errors [B, T] of predicted patches [B, T, P].

    Each target is normalised by mean and (unbiased) variance of its own P pixels, P above 1.
    """
    target = promoted(patches)
    variance, mean = torch.var_mean(target, -1, keepdim=True)
    target = (target - mean) / (variance + 1e-6).sqrt()
    return (promoted(predicted) - target).square().mean(-1)


class Masked(nn.Module):
    """Hidden patches are drawn by seed, step and row. The network's classifier is not trained.

    Args:
        facts: of the training; its network is a `vit`.
        mask: share of the patches that is hidden.
        width, depth: of the decoder, which is dropped at the end.
    """

    def __init__(
        self, facts: ClassifierFacts, mask: float = 0.75, width: int = 32, depth: int = 1
    ) -> None:
        super().__init__()
        network = vit_of(facts.network)
        if not 0 < mask < 1:
            raise SpecError(f"`train.objective.mask: {mask}` is not between 0 and 1")
        positive(width=width, depth=depth)
        if facts.shape[0] * network.patch**2 < 2:
            raise SpecError("`network.options.patch`: a patch of one value has nothing to predict")
        self._patches, self._seed, self._step = network.grid**2, facts.seed, 0
        self._kept = max(1, round(self._patches * (1 - mask)))
        self.read = nn.Linear(network.width, width)
        self.hidden = nn.Parameter(0.02 * torch.randn(width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, self._patches, width))
        self.blocks = nn.Sequential(*(VitBlock(width, 1) for _ in range(depth)))
        self.write = nn.Linear(width, facts.shape[0] * network.patch**2)

    def at_step(self, step: int, num_steps: int) -> None:
        """Masks are of this step."""
        self._step = step

    def forward(
        self, network: nn.Module, images: Tensor, signals: Mapping[str, Tensor]
    ) -> LossValue:
        """See `stillhouse.classification.learner`; the NLL is the loss."""
        network = vit_of(network)
        orders = [
            np.random.default_rng([_MASKS, self._seed, self._step, row]).permutation(self._patches)
            for row in signals[ROWS].tolist()
        ]
        order = torch.from_numpy(np.stack(orders)).to(images.device)
        kept, hidden = order[:, : self._kept], order[:, self._kept :]
        seen = self.read(network.tokens(images, kept))
        index = kept[:, :, None].expand_as(seen)
        empty = self.hidden.expand(len(images), self._patches, -1).to(seen.dtype)
        states = self.blocks(empty.scatter(1, index, seen) + self.positions)
        errors = patch_errors(self.write(states), network.pixels(images))
        loss = errors.gather(1, hidden).mean()
        return LossValue(loss, loss)


def vit_of(network: nn.Module) -> Vit:
    """The network, which has to be a `vit`.

    Raises:
        SpecError: it is not.
    """
    if not isinstance(network, Vit):
        raise SpecError(
            f"`train.objective` reads attention: it needs `network: {{name: vit}}`, not "
            f"{type(network).__name__}"
        )
    return network
