"""Training a network on images in memory: teachers on real ones, students on distilled ones.

An `Objective` maps a student's logits [B, C] on a batch of views to a scalar loss: towards classes,
static soft labels, or the stored answers of teachers to each view. The logits of several teachers
are averaged (INFER). The divergence from soft labels is not scaled by the squared temperature, as
in SRe2L, RDED and INFER.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from stillhouse.distillation.augment import Views, epoch_views
from stillhouse.distillation.recipes import Recipe, ViewSettings
from stillhouse.errors import DivergedError

Objective = Callable[[Tensor, Views], Tensor]
BATCH = 512
"""Images of a forward pass without gradients."""


def fit(
    network: nn.Module,
    images: Tensor,
    objective: Objective,
    recipe: Recipe,
    *,
    seed: int,
    augmentation: Callable[[Tensor], Tensor] | None = None,
    stored_epochs: int | None = None,
) -> list[float]:
    """Train `network` in place, ending in evaluation mode; the mean loss of every epoch.

    Args:
        network, images: on one device; images [N, C, H, W], preprocessed.
        objective: maps logits and views to the loss.
        recipe: optimiser, length, batches and views.
        seed: of the views.
        augmentation: applied to the views' images last (DSA).
        stored_epochs: the views repeat after so many epochs, as stored labels do.

    Raises:
        DivergedError: the loss is NaN or infinite.
    """
    losses: list[float] = []
    optimiser = _optimiser(network, recipe)
    for epoch in range(recipe.epochs):
        if recipe.schedule == "step" and epoch == drop_epoch(recipe.epochs):
            optimiser = _optimiser(network, recipe)
        rate = epoch_rate(recipe, epoch)
        for group in optimiser.param_groups:
            group["lr"] = rate
        network.train()
        total = torch.zeros((), device=images.device)
        drawn_epoch = epoch % (stored_epochs or recipe.epochs)
        for view in epoch_views(
            images, recipe.views, batch_size=recipe.batch_size, seed=seed, epoch=drawn_epoch
        ):
            shown = augmentation(view.images) if augmentation else view.images
            loss = objective(network(shown), view)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            total += loss.detach() * len(view.rows)
        losses.append(float(total) / len(images))
        if not math.isfinite(losses[-1]):
            raise DivergedError(
                f"epoch {epoch + 1} of {recipe.epochs}: loss {losses[-1]} at learning rate "
                f"{rate:.3g}: lower `learning_rate`"
            )
    network.eval()
    return losses


def _optimiser(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    rate, decay = recipe.learning_rate, recipe.weight_decay
    parameters = list(network.parameters())
    if recipe.optimiser == "sgd":
        return torch.optim.SGD(parameters, rate, momentum=recipe.momentum, weight_decay=decay)
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim <= 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, rate, weight_decay=decay)


def epoch_rate(recipe: Recipe, epoch: int) -> float:
    """The learning rate of an epoch, counted from 0."""
    if recipe.schedule == "step":
        return recipe.learning_rate * (0.1 if epoch >= drop_epoch(recipe.epochs) else 1.0)
    length = recipe.epochs * (2 if recipe.schedule == "half_cosine" else 1)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * epoch / length))


def drop_epoch(num_epochs: int) -> int:
    """The first epoch of the lower rate: 502 of 1,001 (MTT's protocol)."""
    return (num_epochs - 1) // 2 + 2


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    network.eval()
    right = sum(
        (network(batch).argmax(1) == classes).sum()
        for batch, classes in zip(images.split(BATCH), labels.split(BATCH), strict=True)
    )
    return int(right) / len(labels)


@torch.no_grad()
def mean_logits(teachers: Sequence[nn.Module], images: Tensor) -> Tensor:
    """The mean of the teachers' logits [N, C]; of plain images these are INFER's static labels."""
    return torch.cat(
        [
            torch.stack([teacher(batch) for teacher in teachers]).mean(0)
            for batch in images.split(BATCH)
        ]
    )


def soft_loss(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """KL(softmax(targets / T) || softmax(logits / T)), mean over the batch; both [B, C] logits."""
    return functional.kl_div(
        (logits / temperature).log_softmax(1),
        (targets / temperature).softmax(1),
        reduction="batchmean",
    )


def towards_classes(labels: Tensor) -> Objective:
    """Cross-entropy with the mixed one-hot label; labels int64 [N] of the set's images."""
    return lambda logits, views: mixed_cross_entropy(logits, labels, views).mean()


def mixed_cross_entropy(logits: Tensor, labels: Tensor, views: Views) -> Tensor:
    """-sum_c q_c log p_c of each view [B], q = weight * e_y + (1 - weight) * e_partner."""
    log_probs = logits.log_softmax(1)

    def of_class(rows: Tensor) -> Tensor:
        classes = labels[rows.to(labels.device)].to(log_probs.device)
        return log_probs.gather(1, classes[:, None])[:, 0]

    return views.weight * -of_class(views.rows) - (1 - views.weight) * of_class(views.partners)


def towards_static(label_logits: Tensor, temperature: float) -> Objective:
    """Soft labels of images, logits [N, C], mixed as the images are (INFER)."""

    def objective(logits: Tensor, views: Views) -> Tensor:
        own = label_logits[views.rows.to(label_logits.device)]
        other = label_logits[views.partners.to(label_logits.device)]
        targets = views.weight * own + (1 - views.weight) * other
        return soft_loss(logits, targets.to(logits), temperature)

    return objective


def towards_stored(view_logits: Tensor, temperature: float) -> Objective:
    """Soft labels of views, logits [epochs, N, C] in the order of the views (FKD)."""

    def objective(logits: Tensor, views: Views) -> Tensor:
        return soft_loss(logits, view_logits[views.epoch, views.span].to(logits), temperature)

    return objective


def label_views(
    answer: Callable[[Views], Tensor],
    images: Tensor,
    settings: ViewSettings,
    *,
    batch_size: int,
    seed: int,
    num_epochs: int,
) -> Tensor:
    """The teachers' answers to every view of images [N, C, H, W]: float16 [epochs, N, ...].

    With `mean_logits` this is SRe2L's relabelling (FKD). Crops, flips and mixtures are not stored:
    `epoch_views` draws them again from the same seed, settings and batch size.
    """
    epochs = [
        epoch_views(images, settings, batch_size=batch_size, seed=seed, epoch=epoch)
        for epoch in range(num_epochs)
    ]
    return torch.stack([torch.cat([answer(view).half() for view in views]) for views in epochs])
