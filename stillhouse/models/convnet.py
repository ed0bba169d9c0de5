"""The ConvNet of the dataset-distillation literature: what trajectories are matched on.

`depth` blocks of 3x3 convolution, norm, ReLU and 2x2 average pooling, then one linear layer.
Parameters come in the order convolution weight, bias, norm scale, shift, block by block, then the
classifier (Zhao et al. 2021; kept by MTT and everything after it, so that experts compare).
"""

from typing import Literal

from torch import Tensor, nn

from stillhouse.errors import ModelError

Norm = Literal["instance", "batch", "none"]


class ConvNet(nn.Module):
    """Images [B, C, H, W] to logits [B, num_classes].

    `features` maps images to the last block's output [B, width, h, w], which `classifier` reads
    flattened. One-channel images are padded by three in the first block, so that 28x28 becomes
    32x32.

    Raises:
        ModelError: the images are too small to be halved `depth` times.
    """

    def __init__(
        self,
        *,
        num_channels: int,
        image_size: int,
        num_classes: int,
        depth: int = 3,
        width: int = 128,
        norm: Norm = "instance",
    ) -> None:
        super().__init__()
        pad = 3 if num_channels == 1 else 1
        side = (image_size + 2 * (pad - 1)) >> depth
        if side < 1:
            raise ModelError(
                f"images of {image_size} pixels cannot be halved {depth} times: "
                "lower the convnet's `depth` or give larger images"
            )
        layers: list[nn.Module] = []
        for block in range(depth):
            first = block == 0
            channels = num_channels if first else width
            layers.append(nn.Conv2d(channels, width, 3, padding=pad if first else 1))
            if norm != "none":
                layers.append(norm_layer(norm, width))
            layers += [nn.ReLU(), nn.AvgPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width * side * side, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes]."""
        return self.classifier(self.features(images).flatten(1))


def norm_layer(norm: Norm, channels: int) -> nn.Module:
    """Batch norm, instance norm (one group per channel, affine, no running statistics), or none."""
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(channels, channels) if norm == "instance" else nn.Identity()
