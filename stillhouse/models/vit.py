"""A small vision transformer (Dosovitskiy et al. 2021), whose attention can be read.

Patches of `patch` x `patch` pixels are tokens; there is no class token: the classifier reads the
mean of the last tokens. Blocks normalise before attention and MLP.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, unfold

from stillhouse.errors import ModelError


class Vit(nn.Module):
    """Images [B, C, H, H] to logits [B, num_classes].

    Raises:
        ModelError: patches do not divide the image, or heads the width.
    """

    def __init__(
        self,
        *,
        num_channels: int,
        image_size: int,
        num_classes: int,
        depth: int = 3,
        width: int = 64,
        patch: int = 4,
        heads: int = 4,
    ) -> None:
        super().__init__()
        if image_size % patch:
            raise ModelError(
                f"images of {image_size} pixels are no whole patches of {patch}: set the vit's "
                "`options.patch`, or `data.image_size`"
            )
        if width % heads:
            raise ModelError(f"the vit's `options.heads` {heads} does not divide its width {width}")
        self.grid, self.patch, self.width, self.heads = image_size // patch, patch, width, heads
        self.embedding = nn.Conv2d(num_channels, width, patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, self.grid**2, width))
        self.blocks = nn.ModuleList(VitBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, num_classes)

    @property
    def stages(self) -> list[nn.Module]:
        return list(self.blocks)

    @property
    def scores(self) -> list[nn.Module]:
        """By block, the module that returns Q K^T / sqrt(d): [B, heads, T, T]."""
        return [block.scores for block in self.blocks if isinstance(block, VitBlock)]

    def embedded(self, images: Tensor) -> Tensor:
        """The patches as tokens before the first block [B, T, width]."""
        return self.embedding(images).flatten(2).transpose(1, 2) + self.positions

    def tokens(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """The last tokens [B, T, width]; of the patches `kept` [B, k] alone where it is given."""
        states = self.embedded(images)
        if kept is not None:
            states = rows_of(states, kept)
        for block in self.blocks:
            states = block(states)
        return self.norm(states)

    def pixels(self, images: Tensor) -> Tensor:
        """The patches [B, T, C * patch^2]."""
        return unfold(images, self.patch, stride=self.patch).transpose(1, 2)

    def classify(self, tokens: Tensor) -> Tensor:
        """Logits [B, num_classes] of the last tokens."""
        return self.classifier(tokens.mean(1))

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.tokens(images))


def rows_of(tokens: Tensor, kept: Tensor) -> Tensor:
    """Tokens [B, T, H] at the places kept [B, k]: [B, k, H]."""
    return tokens.gather(1, kept[..., None].expand(-1, -1, tokens.shape[-1]))


class VitBlock(nn.Module):
    """Attention and MLP, each added to what enters it: [B, T, width] to the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self._heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.scores = _Scores()
        self.output = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, states: Tensor) -> Tensor:
        made = self.queries_keys_values(self.first(states)).unflatten(2, (3, self._heads, -1))
        queries, keys, values = made.permute(2, 0, 3, 1, 4)
        mixed = self.scores(queries, keys).softmax(-1) @ values
        states = states + self.output(mixed.transpose(1, 2).flatten(2))
        return states + self.down(gelu(self.up(self.second(states))))


class _Scores(nn.Module):
    """A module of its own, so that hooks can read what it returns."""

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        return queries @ keys.transpose(-1, -2) / queries.shape[-1] ** 0.5
