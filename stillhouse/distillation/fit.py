"""Training a network on images that fit in memory: teachers on real ones, students on distilled.

One loop for both: passes over views of the images, an objective, an optimiser, a schedule.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from stillhouse.distillation.labels import Objective
from stillhouse.distillation.settings import Recipe
from stillhouse.distillation.views import epoch_views
from stillhouse.errors import DivergedError

Augment = Callable[[Tensor], Tensor]


def fit(
    network: nn.Module,
    images: Tensor,
    objective: Objective,
    recipe: Recipe,
    *,
    seed: int,
    augmentation: Augment | None = None,
    stored_epochs: int | None = None,
) -> list[float]:
    """Train `network` in place, ending in evaluation mode; the mean loss of every epoch.

    Args:
        network: on the device of the images.
        images: [N, C, H, W], standardised.
        objective: maps logits and views to the loss.
        recipe: optimiser, length, batches, views.
        seed: of the views.
        augmentation: applied to the views' images after everything else (DSA).
        stored_epochs: the views begin again after so many epochs, as stored labels do.

    Raises:
        DivergedError: the loss is NaN or infinite.
    """
    losses: list[float] = []
    optimiser = make_optimiser(network, recipe)
    for epoch in range(recipe.epochs):
        if recipe.schedule == "step" and epoch == drop_epoch(recipe.epochs):
            optimiser = make_optimiser(network, recipe)
        for group in optimiser.param_groups:
            group["lr"] = epoch_rate(recipe, epoch)
        network.train()
        total = torch.zeros((), device=images.device)
        for view in epoch_views(
            images,
            recipe.views,
            batch_size=recipe.batch_size,
            seed=seed,
            epoch=epoch % (stored_epochs or recipe.epochs),
        ):
            shown = augmentation(view.images) if augmentation else view.images
            loss = objective(network(shown), view)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            total += loss.detach() * len(view.rows)
        losses.append(_finite(float(total) / len(images), epoch, recipe))
    network.eval()
    return losses


def make_optimiser(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """A fresh SGD or AdamW for all parameters."""
    parameters = list(network.parameters())
    if recipe.optimiser == "sgd":
        return torch.optim.SGD(
            parameters,
            recipe.learning_rate,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
        )
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim <= 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, recipe.learning_rate, weight_decay=recipe.weight_decay)


def epoch_rate(recipe: Recipe, epoch: int) -> float:
    """The learning rate of an epoch, counted from 0."""
    if recipe.schedule == "step":
        return recipe.learning_rate * (0.1 if epoch >= drop_epoch(recipe.epochs) else 1.0)
    length = recipe.epochs * (2 if recipe.schedule == "half_cosine" else 1)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * epoch / length))


def drop_epoch(num_epochs: int) -> int:
    """The first epoch of the lower rate: 502 of 1,001 (MTT's protocol)."""
    return (num_epochs - 1) // 2 + 2


def _finite(loss: float, epoch: int, recipe: Recipe) -> float:
    if not math.isfinite(loss):
        raise DivergedError(
            f"epoch {epoch + 1} of {recipe.epochs}: loss {loss} at learning rate "
            f"{epoch_rate(recipe, epoch):.3g}: lower `learning_rate`"
        )
    return loss
