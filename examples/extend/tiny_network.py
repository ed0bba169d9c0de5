"""A network of one's own: `network: {name: "tiny_network:make", options: {width: 8}}`."""

from torch import nn


def make(num_channels: int, image_size: int, num_classes: int, width: int = 8) -> nn.Module:
    """One convolution with batch norm, so that it can teach, and a linear layer over the mean."""
    return nn.Sequential(
        nn.Conv2d(num_channels, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * width, num_classes),
    )
