"""SRe2L: squeeze a data set into a teacher, recover images from its batch statistics, relabel.

    L = CE(f(T(x)), y) + r_bn * sum_l w_l (||mean_l - mu_l||_2 + ||var_l - sigma2_l||_2)

mean_l and var_l (biased) are taken per channel over batch and space of the input of batch norm
layer l, mu_l and sigma2_l are its running statistics, w is 10 for the first layer and 1 for the
others (Yin et al. 2023, section 3; the term is DeepInversion's). L depends on the moments of the
whole batch: which images are recovered together is part of the method.
"""

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from stillhouse.distillation.augment import resized_crop
from stillhouse.distillation.decoupled import (
    DecoupledMethod,
    ImageUnit,
    UnitMade,
    UnitWork,
    task_rng,
)
from stillhouse.distillation.prepared import batch_norms
from stillhouse.distillation.preprocessing import Standardisation
from stillhouse.distillation.recipes import ProtocolName
from stillhouse.errors import DivergedError
from stillhouse.spec import Count, Settings

_FIRST_LAYER = 10.0
_BETAS = (0.5, 0.9)


class MatchingSettings(Settings):
    """How images, or a compensator, are fitted to a teacher: Adam with a cosine to 0."""

    iterations: Count = 1_000
    learning_rate: Annotated[float, Field(gt=0)] = 0.25
    statistics_weight: Annotated[float, Field(ge=0)] = Field(
        default=0.01, description="r_bn; the terms grow with the network's depth and width"
    )
    jitter: Annotated[int, Field(ge=0)] = Field(
        default=4, description="images are rolled by 0 to this many pixels in both directions"
    )


class Sre2l(DecoupledMethod, MatchingSettings):
    """Images recovered from a teacher's batch statistics (Yin et al. 2023)."""

    protocol: ClassVar[ProtocolName] = "p2"

    batch_size: Count = Field(default=100, description="images whose statistics are taken together")
    min_scale: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="below 1: random crops of at least this share (0.08 for ImageNet)"
    )
    total_variation: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="weight of the smoothness prior"
    )
    l2: Annotated[float, Field(ge=0)] = Field(default=0.0, description="weight of the image norm")

    def units(self, stage: str, num_teachers: int, num_classes: int) -> list[ImageUnit]:
        batches = recovery_batches(num_classes, self.images_per_class, self.batch_size)
        return [ImageUnit(index) for index in range(len(batches))]

    def make(self, work: UnitWork) -> UnitMade:
        """Recover a batch."""
        prepared, rng = work.prepared, task_rng(self.seed, work.unit.index)
        batches = recovery_batches(prepared.num_classes, self.images_per_class, self.batch_size)
        labels = batches[work.unit.index].to(prepared.device)
        norm = prepared.standardisation
        return recover(work.teacher, labels, prepared.shape, self, norm, rng=rng)

    def image_labels(self, num_classes: int) -> Tensor:
        return torch.arange(num_classes).repeat(self.images_per_class)


def matching_loss(
    teacher: nn.Module, images: Tensor, labels: Tensor, statistics_weight: float
) -> Tensor:
    """L of images [B, C, H, W] without augmentation; the teacher is in evaluation mode."""
    with _statistics_terms(teacher) as layers:
        cross_entropy = functional.cross_entropy(teacher(images), labels)
    return cross_entropy + statistics_weight * sum(layers[1:], layers[0] * _FIRST_LAYER)


@contextmanager
def _statistics_terms(network: nn.Module) -> Generator[list[Tensor]]:
    """Collects ||mean - mu|| + ||var - sigma2|| of each layer in a forward pass."""
    terms: list[Tensor] = []

    def measure(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        values: Tensor = inputs[0]
        layer: Any = module
        mean = values.mean((0, 2, 3)) - layer.running_mean
        var = values.var((0, 2, 3), correction=0) - layer.running_var
        terms.append(mean.norm() + var.norm())

    handles = [layer.register_forward_pre_hook(measure) for layer in batch_norms(network)]
    try:
        yield terms
    finally:
        for handle in handles:
            handle.remove()


def total_variation(images: Tensor) -> Tensor:
    """SRe2L's smoothness prior: norms of the differences to four neighbours, summed."""
    differences = [
        images[..., :-1] - images[..., 1:],
        images[..., :-1, :] - images[..., 1:, :],
        images[..., 1:, :-1] - images[..., :-1, 1:],
        images[..., :-1, :-1] - images[..., 1:, 1:],
    ]
    return torch.stack([d.norm() for d in differences]).sum()


def image_norm(images: Tensor) -> Tensor:
    """The mean L2 norm of images [B, C, H, W]."""
    return images.flatten(1).norm(dim=1).mean()


def recovery_batches(num_classes: int, images_per_class: int, batch_size: int) -> list[Tensor]:
    """Labels int64 of each batch: all classes in turn, repeated, cut every `batch_size` images."""
    return list(torch.arange(num_classes).repeat(images_per_class).split(batch_size))


def recover(
    teacher: nn.Module,
    labels: Tensor,
    shape: tuple[int, ...],
    settings: Sre2l,
    standardisation: Standardisation,
    *,
    rng: np.random.Generator,
) -> UnitMade:
    """Images [B, *shape] in the range of pixels, from noise for labels [B]; and all losses."""
    noise = rng.standard_normal((len(labels), *shape), dtype=np.float32)
    images = torch.from_numpy(noise).to(labels.device).requires_grad_()

    def loss() -> Tensor:
        shown = images
        if settings.min_scale < 1:
            shown = _crop_together(images, settings.min_scale, rng)
        shown = roll(shown, settings.jitter, rng)
        total = matching_loss(teacher, shown, labels, settings.statistics_weight)
        if settings.total_variation:
            total = total + settings.total_variation * total_variation(shown)
        return total + settings.l2 * image_norm(shown) if settings.l2 else total

    def clip() -> None:
        images.data.copy_(standardisation.clip(images.data))

    losses = minimise(images, loss, settings, after_step=clip)
    return images.detach(), losses


def minimise(
    variable: Tensor,
    loss: Callable[[], Tensor],
    settings: MatchingSettings,
    *,
    after_step: Callable[[], None] | None = None,
) -> list[float]:
    """Adam (betas 0.5 and 0.9) on one tensor in place, with a cosine rate to 0; all losses.

    Raises:
        DivergedError: a loss is NaN or infinite.
    """
    optimiser = torch.optim.Adam([variable], settings.learning_rate, betas=_BETAS, eps=1e-8)
    losses: list[float] = []
    for iteration in range(settings.iterations):
        rate = cosine_rate(settings.learning_rate, iteration, settings.iterations)
        optimiser.param_groups[0]["lr"] = rate
        value = loss()
        losses.append(value.item())
        if not math.isfinite(losses[-1]):
            raise DivergedError(
                f"iteration {iteration + 1} of {settings.iterations}: loss {losses[-1]} at "
                f"learning rate {rate:.3g}: lower `method.learning_rate` or "
                "`method.statistics_weight`"
            )
        (variable.grad,) = torch.autograd.grad(value, [variable])
        optimiser.step()
        if after_step is not None:
            after_step()
    return losses


def cosine_rate(peak: float, step: int, num_steps: int) -> float:
    return 0.5 * peak * (1 + math.cos(math.pi * step / num_steps))


def roll(images: Tensor, jitter: int, rng: np.random.Generator) -> Tensor:
    """All images rolled by the same random 0 to `jitter` pixels in each direction."""
    shift = rng.integers(0, jitter + 1, 2).tolist()
    return images.roll(shift, dims=(2, 3)) if any(shift) else images


def _crop_together(images: Tensor, min_scale: float, rng: np.random.Generator) -> Tensor:
    """One random crop and flip for the whole batch, which is folded into channels."""
    folded = images.reshape(1, -1, *images.shape[2:])
    cropped = resized_crop(folded, min_scale, rng).reshape(images.shape)
    return cropped.flip(-1) if rng.random() < 0.5 else cropped
