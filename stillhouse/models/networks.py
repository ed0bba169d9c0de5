"""Networks for classes: ConvNet, ResNet-18, a small vision transformer, MLP, or a user's factory.

ConvNet (Zhao et al. 2021) is the network of the dataset-distillation literature: `depth` blocks of
3x3 convolution, norm, ReLU and 2x2 average pooling, then a linear layer. Parameters are ordered as
there, so that expert trajectories are compatible: weight, bias, norm scale and shift of each block,
then the classifier.

ResNet-18 (He et al. 2016) has the stem for CIFAR-sized images that SRe2L, RDED and INFER use: 3x3,
stride 1, no pooling.
"""

from collections.abc import Mapping
from importlib import import_module
from itertools import pairwise
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillhouse.errors import ModelError
from stillhouse.models.device import initialised
from stillhouse.models.network_settings import IMAGE_NETWORKS, NetworkSettings
from stillhouse.models.vit import Vit

Norm = Literal["instance", "batch", "none"]


class ConvNet(nn.Module):
    """Images [B, C, H, W] to logits [B, num_classes].

    `features` maps images to the last block's output [B, width, h, w]; `classifier` reads it
    flattened. One-channel images are padded by 3 in the first block, so that 28x28 becomes 32x32.

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
            channels, padding = (width, 1) if block else (num_channels, pad)
            layers.append(nn.Conv2d(channels, width, 3, padding=padding))
            if norm != "none":
                layers.append(_norm(norm, width))
            layers += [nn.ReLU(), nn.AvgPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width * side * side, num_classes)

    @property
    def stages(self) -> list[nn.Module]:
        """The end of each block."""
        return [layer for layer in self.features if isinstance(layer, nn.AvgPool2d)]

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).flatten(1))


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
        stages = [_convolution(num_channels, width, 3, 1, norm), _norm(norm, width), nn.ReLU()]
        for stage, (inputs, outputs) in enumerate(pairwise(widths)):
            stages.append(_Block(inputs, outputs, 1 if stage == 0 else 2, norm))
            stages.append(_Block(outputs, outputs, 1, norm))
        self.features = nn.Sequential(*stages)
        self.classifier = nn.Linear(8 * width, num_classes)

    @property
    def stages(self) -> list[nn.Module]:
        """The end of each stage of two blocks."""
        blocks = [layer for layer in self.features if isinstance(layer, _Block)]
        return [*blocks[1::2]]

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).mean((2, 3)))


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected by 1x1 where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            _convolution(inputs, outputs, 3, stride, norm),
            _norm(norm, outputs),
            nn.ReLU(),
            _convolution(outputs, outputs, 3, 1, norm),
            _norm(norm, outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                _convolution(inputs, outputs, 1, stride, norm), _norm(norm, outputs)
            )

    def forward(self, images: Tensor) -> Tensor:
        return (self.branch(images) + self.shortcut(images)).relu()


def _convolution(inputs: int, outputs: int, size: int, stride: int, norm: Norm) -> nn.Module:
    """With a bias only where no norm follows, whose shift would make it redundant."""
    bias = norm == "none"
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=bias)


def _norm(norm: Norm, channels: int) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(channels, channels) if norm == "instance" else nn.Identity()


class Mlp(nn.Module):
    """Vectors [B, D], or images as such, to logits [B, num_classes]; linear if `depth` is 0.

    `stages` are the hidden layers, each with ReLU.
    """

    def __init__(self, *, num_features: int, num_classes: int, depth: int, width: int) -> None:
        super().__init__()
        sizes = [num_features, *[width] * depth]
        self.features = nn.Sequential(
            *(nn.Sequential(nn.Linear(*size), nn.ReLU()) for size in pairwise(sizes))
        )
        self.classifier = nn.Linear(sizes[-1], num_classes)

    @property
    def stages(self) -> list[nn.Module]:
        return list(self.features)

    def forward(self, samples: Tensor) -> Tensor:
        return self.classifier(self.features(samples.flatten(1)))


def build_network(
    settings: NetworkSettings,
    shape: tuple[int, ...],
    num_classes: int,
    seed: int,
    body: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A fresh network on the CPU; its weights depend on the seed alone.

    Args:
        shape: of a sample: (C, H, W) of an image, (D,) of a vector, (T,) of tokens.
        body: the configuration of a language model.

    Raises:
        ModelError: samples of another kind than it reads, images too small for its depth, or a
            factory that is missing or fails.
    """
    if settings.name in IMAGE_NETWORKS and len(shape) != 3:
        raise ModelError(
            f"a {settings.name} reads images, the data are none: set another `network`"
        )
    if (settings.name == "language_model") != (body is not None):
        raise ModelError("a language_model reads the texts of `task: classify` (`text_column`)")
    channels, side = shape[0], shape[-1]

    def make() -> nn.Module:
        if settings.factory is not None:
            return _from_factory(settings.factory, settings, shape, num_classes)
        if body is not None:
            from stillhouse.models.text_classifier import TextClassifier, empty_body

            return TextClassifier(empty_body(body), num_classes, frozen=settings.frozen)
        if settings.name in ("linear", "mlp"):
            return Mlp(
                num_features=prod(shape),
                num_classes=num_classes,
                depth=settings.depth if settings.name == "mlp" else 0,
                width=settings.width or 128,
            )
        if settings.name == "resnet18":
            return ResNet18(
                num_channels=channels,
                num_classes=num_classes,
                width=settings.width or 64,
                norm=settings.norm or "batch",
            )
        if settings.name == "vit":
            return Vit(
                num_channels=channels,
                image_size=side,
                num_classes=num_classes,
                depth=settings.depth,
                width=settings.width or 64,
                **settings.options,
            )
        return ConvNet(
            num_channels=channels,
            image_size=side,
            num_classes=num_classes,
            depth=settings.depth,
            width=settings.width or 128,
            norm=settings.norm or "instance",
        )

    return initialised(make, seed)


def _from_factory(
    factory: str, settings: NetworkSettings, shape: tuple[int, ...], num_classes: int
) -> nn.Module:
    module, _, name = factory.partition(":")
    try:
        make = getattr(import_module(module), name)
    except Exception as error:  # whatever the user's module raises
        why = str(error) if isinstance(error, ImportError | AttributeError) else repr(error)
        raise ModelError(
            f"`factory: {factory}` cannot be imported by a worker: {why}. Install its "
            "package where workers run, or name its folder in PYTHONPATH"
        ) from error
    sizes = {"num_features": shape[0]}
    if len(shape) == 3:
        sizes = {"num_channels": shape[0], "image_size": shape[1]}
    try:
        made = make(**sizes, num_classes=num_classes, **settings.options)
    except Exception as error:
        raise ModelError(f"`factory: {factory}` raised {type(error).__name__}: {error}") from error
    if not isinstance(made, nn.Module):
        raise ModelError(f"`factory: {factory}` returned {type(made)}, not a torch.nn.Module")
    return made


def state_tensors(network: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers as contiguous CPU tensors."""
    return {name: value.cpu().contiguous() for name, value in network.state_dict().items()}
