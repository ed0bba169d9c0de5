"""How networks are trained on a distilled set, and the accuracy that says how good it is.

Three published protocols: `p1` (MTT and what follows it), `p2` (SRe2L and INFER on CIFAR), `p3`
(RDED). Each is a recipe and a temperature of soft labels. Their authors also choose on the test
set, the best distillation step or epoch; here the test set is touched once, after the last epoch.
Figures of different protocols do not compare.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillhouse.distillation.settings import Recipe, ViewSettings
from stillhouse.distillation.spec import EvaluateSettings

ProtocolName = Literal["p1", "p2", "p3"]
_BATCH = 512


@dataclass(frozen=True, slots=True)
class Protocol:
    """How a network is trained: `temperature` is of soft labels."""

    recipe: Recipe
    temperature: float


def named_protocol(
    name: ProtocolName,
    settings: EvaluateSettings,
    *,
    images_per_class: int,
    num_classes: int,
    learning_rate: float | None = None,
    factor: int = 1,
    flips: bool = True,
) -> Protocol:
    """A published protocol for a set, with the spec's changes.

    Args:
        name: p1, p2 or p3.
        settings: its `epochs` and `batch_size` replace the protocol's.
        images_per_class: of the set; decides p3's batch.
        num_classes: likewise.
        learning_rate: p1: the one that was learned with the set; default 0.01.
        factor: p3: patches along a side of RDED's images.
        flips: whether views may be mirrored.
    """
    recipe, temperature = _published(name, images_per_class, num_classes, learning_rate, factor)
    asked: dict[str, Any] = {"epochs": settings.epochs, "batch_size": settings.batch_size}
    changes = {key: value for key, value in asked.items() if value is not None}
    recipe = Recipe.model_validate(recipe.model_dump() | changes)
    return Protocol(recipe if flips else recipe.without_flips(), temperature)


def _published(
    name: ProtocolName,
    images_per_class: int,
    num_classes: int,
    learning_rate: float | None,
    factor: int,
) -> tuple[Recipe, float]:
    """Recipe and temperature as published."""
    if name == "p1":
        recipe = Recipe(
            optimiser="sgd",
            learning_rate=learning_rate or 0.01,
            weight_decay=5e-4,
            epochs=1001,
            batch_size=256,
            schedule="step",
            views=ViewSettings(crop="none", flip=False, mix="none"),
        )
        return recipe, 1.0
    if name == "p2":
        return Recipe(epochs=400, batch_size=128), 30.0
    batch = 10 if images_per_class < 10 else 50 if images_per_class < 50 else 100
    views = ViewSettings(
        crop="resized", min_scale=1 / factor, mix="cutmix", mix_beta=1.0, patches=factor
    )
    recipe = Recipe(
        epochs=300,
        batch_size=batch * (2 if num_classes >= 100 else 1),
        schedule="half_cosine",
        views=views,
    )
    return recipe, 20.0


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images [N, C, H, W] whose largest logit is that of their class."""
    network.eval()
    right = sum(
        (network(batch).argmax(1) == classes).sum()
        for batch, classes in zip(images.split(_BATCH), labels.split(_BATCH), strict=True)
    )
    return int(right) / len(labels)
