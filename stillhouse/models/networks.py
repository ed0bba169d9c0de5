"""Networks for images by their settings: ConvNet, ResNet-18, or anybody's factory."""

from importlib import import_module

import torch
from torch import nn

from stillhouse.distillation.spec import NetworkSettings
from stillhouse.errors import ModelError
from stillhouse.models.convnet import ConvNet
from stillhouse.models.resnet import ResNet18
from stillhouse.models.seeded import initialised


def build_network(
    settings: NetworkSettings, shape: tuple[int, int, int], num_classes: int, seed: int
) -> nn.Module:
    """A fresh network on the CPU for images of (C, H, W); its weights depend on the seed alone.

    Raises:
        ModelError: images too small for its depth, or a factory that is not there or fails.
    """
    channels, side, _ = shape
    if settings.factory is not None:
        return initialised(lambda: _from_factory(settings, shape, num_classes), seed)
    if settings.name == "resnet18":
        return initialised(
            lambda: ResNet18(
                num_channels=channels,
                num_classes=num_classes,
                width=settings.width or 64,
                norm=settings.norm or "batch",
            ),
            seed,
        )
    return initialised(
        lambda: ConvNet(
            num_channels=channels,
            image_size=side,
            num_classes=num_classes,
            depth=settings.depth,
            width=settings.width or 128,
            norm=settings.norm or "instance",
        ),
        seed,
    )


def _from_factory(
    settings: NetworkSettings, shape: tuple[int, int, int], num_classes: int
) -> nn.Module:
    assert settings.factory is not None
    module, _, name = settings.factory.partition(":")
    try:
        make = getattr(import_module(module), name)
    except Exception as error:  # whatever its module does
        why = str(error) if isinstance(error, ImportError | AttributeError) else repr(error)
        raise ModelError(
            f"`factory: {settings.factory}` cannot be imported by a worker: {why}. Install its "
            "package where workers run, or name its folder in PYTHONPATH"
        ) from error
    try:
        made = make(
            num_channels=shape[0], image_size=shape[1], num_classes=num_classes, **settings.options
        )
    except Exception as error:
        raise ModelError(
            f"`factory: {settings.factory}` raised {type(error).__name__}: {error}"
        ) from error
    if not isinstance(made, nn.Module):
        raise ModelError(f"`factory: {settings.factory}` gave {type(made)}, no torch.nn.Module")
    return made


def num_parameters(network: nn.Module) -> int:
    """All parameters."""
    return sum(parameter.numel() for parameter in network.parameters())


def state_tensors(network: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers as contiguous CPU tensors, to be stored."""
    return {name: value.cpu().contiguous() for name, value in network.state_dict().items()}
