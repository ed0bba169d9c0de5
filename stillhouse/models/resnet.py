"""ResNet-18 for small images: a 3x3 stem with stride 1 and no pooling before the first stage.

He et al. 2016, with the stem that CIFAR-sized images need (SRe2L, RDED and INFER all use it).
"""

from itertools import pairwise

from torch import Tensor, nn

from stillhouse.models.convnet import Norm, norm_layer


class ResNet18(nn.Module):
    """Images [B, C, H, W] of any size to logits [B, num_classes].

    `features` gives the last stage's output [B, 8 * width, H / 8, W / 8] (rounded up); `classifier`
    reads its mean over space. `width` is that of the first stage, 64 in the paper.
    """

    def __init__(
        self, *, num_channels: int, num_classes: int, width: int = 64, norm: Norm = "batch"
    ) -> None:
        super().__init__()
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        stages: list[nn.Module] = [
            _convolution(num_channels, width, 3, 1, norm),
            norm_layer(norm, width),
            nn.ReLU(),
        ]
        for stage, (inputs, outputs) in enumerate(pairwise(widths)):
            stages.append(_Block(inputs, outputs, 1 if stage == 0 else 2, norm))
            stages.append(_Block(outputs, outputs, 1, norm))
        self.features = nn.Sequential(*stages)
        self.classifier = nn.Linear(8 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes]."""
        return self.classifier(self.features(images).mean((2, 3)))


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected by 1x1 where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            _convolution(inputs, outputs, 3, stride, norm),
            norm_layer(norm, outputs),
            nn.ReLU(),
            _convolution(outputs, outputs, 3, 1, norm),
            norm_layer(norm, outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                _convolution(inputs, outputs, 1, stride, norm), norm_layer(norm, outputs)
            )

    def forward(self, images: Tensor) -> Tensor:
        return (self.branch(images) + self.shortcut(images)).relu()


def _convolution(inputs: int, outputs: int, size: int, stride: int, norm: Norm) -> nn.Conv2d:
    """A norm's shift makes the bias idle, so that only nets without norm have one."""
    bias = norm == "none"
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=bias)
