"""NRR-DD: critical regions of real patches are kept, the rest is refined; two distances a view.

No reference code exists; this follows second-hand descriptions of Tran et al. (CVPR 2025):

* initial images: patches that cover what the teacher looks at (class activation map) and of those,
  opposite to RDED, the ones it is LEAST sure of, stitched together;
* refinement: x <- x - M * lr * grad_x (CE + alpha_bn * L_bn) with M = max(0, epsilon - CAM), so
  that pixels under a strong map never move;
* distance-based representative (DBR): of a teacher's answer to a view only d_org = CE(p, e_y) and
  d_aug = CE(p, w e_y + (1 - w) e_y') are stored, and a student is trained with its cross-entropy on
  the mixed label plus its deviation from both. They determine exactly p_y and p_y'.

Our choices, where the descriptions are silent: the map (positive part of activation times gradient
at the last spatial layer, divided by its maximum; the class activation map of a linear head), taken
once before refinement; patches that the teacher gets wrong come after all that it gets right; a
patch's cover is its share of the map's sum; the gradient is that of the sum over images, so that a
step does not depend on the batch size; the deviation, which is the divergence of the probabilities
that the two distances determine (with the mean absolute difference a teacher's few large distances,
which pull against the cross-entropy, dominate: 3 points less on Fashion-MNIST); all values of
`NrrDd`. On small images a low `min_scale` cuts objects off, and the patches that the teacher is
least sure of teach little.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from stillhouse.distillation.augment import Views
from stillhouse.distillation.decoupled import (
    DecoupledMethod,
    ImageUnit,
    UnitMade,
    UnitWork,
    task_rng,
)
from stillhouse.distillation.evaluate import Objective, mean_logits, mixed_cross_entropy
from stillhouse.distillation.methods.rded import (
    PatchSettings,
    draw_candidates,
    draw_crops,
    patch_log_probs,
    select_patches,
    stitch,
    sure_patches,
)
from stillhouse.distillation.methods.sre2l import matching_loss, recovery_batches
from stillhouse.distillation.preprocessing import Standardisation
from stillhouse.errors import DivergedError
from stillhouse.spec import Count

_LEAST_SHARE = 0.02
"""Share of the partner in a view from which half-precision distances tell its probability."""
_TINY = 1e-6


class NrrDd(PatchSettings, DecoupledMethod):
    """Critical regions kept, the rest refined; two distances a view (Tran et al. 2025)."""

    stages: ClassVar[tuple[str, ...]] = ("patches", "distil")

    labels: Literal["classes", "static", "views", "distances"] = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default="distances", description="DBR: two numbers a view"
    )
    least_sure: bool = Field(
        default=True, description="start from the patches a teacher is least sure of; else the most"
    )

    num_covering: Count = Field(
        default=2,
        description="crops of an image that cover most of its map; the least sure is kept",
    )
    iterations: Count = Field(default=200, description="of refinement")
    batch_size: Count = Field(default=100, description="images whose statistics are taken together")
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    statistics_weight: Annotated[float, Field(ge=0)] = Field(default=0.01, description="alpha_bn")
    epsilon: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.5, description="where the map is stronger, pixels are critical and never move"
    )
    class_weight: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="of L_sce, the cross-entropy with the mixed classes"
    )
    deviation_weight: Annotated[float, Field(gt=0)] = Field(default=1.0, description="alpha_dbr")
    deviation: Literal["divergence", "absolute"] = Field(
        default="divergence",
        description="L_dbr. divergence: of the probabilities that two distances pin down (class, "
        "partner's class, all others); absolute: mean difference of the distances",
    )

    def units(self, stage: str, num_teachers: int, num_classes: int) -> list[ImageUnit]:
        """Patches class by class, then batches of all classes."""
        if stage == "patches":
            return [ImageUnit(label) for label in range(num_classes)]
        batches = recovery_batches(num_classes, self.images_per_class, self.batch_size)
        return [ImageUnit(index) for index in range(len(batches))]

    def make(self, work: UnitWork) -> UnitMade:
        """A class's patches, or a refined batch."""
        prepared, index, count = work.prepared, work.unit.index, self.images_per_class
        if work.stage == "patches":
            choose = critical_patches if self.least_sure else sure_patches
            rng = task_rng(self.seed, index)
            real = prepared.train, prepared.train_labels
            return choose(work.teacher, *real, index, count, self, rng), []
        labels = recovery_batches(prepared.num_classes, count, self.batch_size)[index]
        images = torch.stack(list(work.before), 1).flatten(0, 1).split(self.batch_size)[index]
        images, labels = images.to(prepared.device), labels.to(prepared.device)
        return refine(work.teacher, images, labels, self, prepared.standardisation)

    def image_labels(self, num_classes: int) -> Tensor:
        return torch.arange(num_classes).repeat(self.images_per_class)

    def answer(self, teachers: Sequence[nn.Module], labels: Tensor, views: Views) -> Tensor:
        """The teachers' two distances on every view [B, 2], or their logits."""
        logits = mean_logits(teachers, views.images)
        return distances(logits, labels, views) if self.labels == "distances" else logits

    def objective(self, labels: Tensor, stored: Tensor, temperature: float) -> Objective:
        if self.labels == "distances":
            return towards_distances(labels, stored, self)
        return super().objective(labels, stored, temperature)


def activation_map(teacher: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """How much each pixel speaks for the class: [B, C, H, W] -> [B, H, W] in [0, 1].

    For networks whose last spatial layer is read by a linear classifier, flattened or averaged.
    All 0 where nothing speaks for the class.
    """
    places = relevance(teacher, images, labels).clamp(min=0)
    peak = places.amax((1, 2), keepdim=True).clamp(min=torch.finfo(places.dtype).tiny)
    enlarged = functional.interpolate(
        (places / peak)[:, None], images.shape[-2:], mode="bilinear", align_corners=False
    )
    return enlarged[:, 0].detach()


def relevance(teacher: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The class's logit distributed over the places of the last spatial layer: [B, h, w].

    Activation times gradient, summed over channels; under a linear classifier the places sum to
    the logit less its bias.
    """
    with _spatial_outputs(teacher) as outputs:
        logits = teacher(images.detach().requires_grad_())
    last = outputs[-1]
    (gradient,) = torch.autograd.grad(logits.gather(1, labels[:, None]).sum(), [last])
    return (last * gradient).sum(1).detach()


@contextmanager
def _spatial_outputs(network: nn.Module) -> Generator[list[Tensor]]:
    """Collects the modules' outputs [B, C, h, w] with more than one place, in order."""
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2:].numel() > 1:
            outputs.append(output)

    handles = [module.register_forward_hook(keep) for module in network.modules()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def critical_patches(
    teacher: nn.Module,
    images: Tensor,
    labels: Tensor,
    label: int,
    images_per_class: int,
    settings: NrrDd,
    rng: np.random.Generator,
) -> Tensor:
    """The initial images of one class [images_per_class, C, H, H], out of real ones [N, C, H, H].

    Raises:
        InputError: the class has fewer images than patches are needed.
    """
    count = images_per_class * settings.factor**2
    real = images[draw_candidates(labels, label, settings, count, rng).to(images.device)]
    patches, boxes = draw_crops(real, settings, rng)
    side = images.shape[-1]
    maps = activation_map(teacher, real, torch.full((len(real),), label, device=images.device))
    covering = cover(maps, boxes).topk(min(settings.num_covering, settings.num_crops)).indices
    patches = patches[torch.arange(len(real))[:, None], covering]
    scores = doubt_score(patch_log_probs(teacher, patches, side), label)
    return stitch(select_patches(patches, scores, count), settings.factor, side)


def doubt_score(log_probs: Tensor, label: int) -> Tensor:
    """Scores [...] of patches by log_probs [..., num_classes]; the lowest is taken first.

    Patches that the teacher gets right come first, least sure first; then those that it gets
    wrong, likeliest first.
    """
    own = log_probs[..., label]
    return torch.where(log_probs.argmax(-1) == label, own, -own)


def cover(maps: Tensor, boxes: Tensor) -> Tensor:
    """The share of each map [n, H, W] in each of its boxes (top, left, side) [n, m, 3]: [n, m]."""
    sums = functional.pad(maps.double().cumsum(1).cumsum(2), [1, 0, 1, 0]).cpu()
    rows = torch.arange(len(maps))[:, None]
    top, left, side = boxes.unbind(-1)
    bottom, right = top + side, left + side
    upper = sums[rows, bottom, right] - sums[rows, top, right]
    inside = upper - sums[rows, bottom, left] + sums[rows, top, left]
    return inside / sums[:, -1:, -1].clamp(min=torch.finfo(sums.dtype).tiny)


def refine(
    teacher: nn.Module,
    images: Tensor,
    labels: Tensor,
    settings: NrrDd,
    standardisation: Standardisation,
) -> UnitMade:
    """Refined images [B, C, H, W] in the range of pixels, and the loss before each step.

    Raises:
        DivergedError: a loss is not finite.
    """
    mask = (settings.epsilon - activation_map(teacher, images, labels)).clamp(min=0)[:, None]
    losses: list[float] = []
    for iteration in range(settings.iterations):
        images = images.detach().requires_grad_()
        loss = matching_loss(teacher, images, labels, settings.statistics_weight)
        losses.append(loss.item())
        if not np.isfinite(losses[-1]):
            raise DivergedError(
                f"refinement step {iteration + 1} of {settings.iterations}: loss {losses[-1]}: "
                "lower `method.learning_rate` or `method.statistics_weight`"
            )
        (gradient,) = torch.autograd.grad(loss * len(images), [images])
        moved = standardisation.clip(images - mask * settings.learning_rate * gradient)
        images = torch.where(mask > 0, moved, images)
    return images.detach(), losses


def distances(logits: Tensor, labels: Tensor, views: Views) -> Tensor:
    """(d_org, d_aug) of each view in nats: logits [B, C], labels int64 of the set -> [B, 2]."""
    classes = labels[views.rows.to(labels.device)].to(logits.device)
    original = functional.cross_entropy(logits, classes, reduction="none")
    return torch.stack([original, mixed_cross_entropy(logits, labels, views)], 1)


def pinned_down(measured: Tensor, labels: Tensor, views: Views) -> Tensor:
    """The probabilities [B, 3] that two distances [B, 2] determine; they sum to 1.

    Of the image's class, its partner's class, and all others. Where both classes are the same or
    almost nothing of the partner was mixed in, the second is 0 and counted among the others.
    """
    own, other = (labels[rows.to(labels.device)] for rows in (views.rows, views.partners))
    share = max(1 - views.weight, _LEAST_SHARE)
    known = ((own != other) & (1 - views.weight >= _LEAST_SHARE)).to(measured.device)
    log_other = (views.weight * measured[:, 0] - measured[:, 1]) / share
    p_own, p_other = (-measured[:, 0]).exp(), log_other.masked_fill(~known, -torch.inf).exp()
    cells = torch.stack([p_own, p_other, 1 - p_own - p_other], 1).clamp(min=0)
    return cells / cells.sum(1, keepdim=True)


def towards_distances(labels: Tensor, stored: Tensor, settings: NrrDd) -> Objective:
    """L_S = L_sce + alpha_dbr * L_dbr: mixed labels' cross-entropy, and the stored distances.

    Labels int64 [N]; `stored` [epochs, N, 2] are distances in the order of the views.
    """

    def objective(logits: Tensor, views: Views) -> Tensor:
        own = distances(logits, labels, views)
        target = stored[views.epoch, views.span].to(own)
        if settings.deviation == "absolute":
            deviation = (own - target).abs().mean()
        else:
            teacher, student = (pinned_down(one, labels, views) for one in (target, own))
            deviation = functional.kl_div(
                student.clamp(min=_TINY).log(), teacher, reduction="batchmean"
            )
        return settings.class_weight * own[:, 1].mean() + settings.deviation_weight * deviation

    return objective
