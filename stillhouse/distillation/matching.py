"""Trajectory matching: train a student on the synthetic set and compare it with an expert.

MTT (Cazenavette et al. 2022): from an expert's parameters theta_0 = expert[t], N steps on the
synthetic set lead to theta_N, and

    L = ||theta_N - expert[t+M]||^2 / ||theta_0 - expert[t+M]||^2

is differentiated through the steps by the images, by the step size eta and, with DATM (Guo et al.
2024), by label logits. The gradient is exact and needs the memory of one step
(`stillhouse.distillation.adjoint`).

TESLA (Cui et al. 2023) has the same L but ignores how theta_n depends on earlier images. That is
the adjoint without its Hessian-vector products: dL/dx_n = (2/D) d[(eta (theta* - theta_0) +
eta^2 G) . g_n]/dx, G = sum_n g_n, D = ||theta_0 - theta*||^2. (The released code applies half.)

`TrajectoryMethod` has the settings that all of these methods share, and MTT's behaviour; a method
overrides what its paper changes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from stillhouse.distillation.adjoint import (
    Descent,
    FlatModule,
    Gradients,
    Run,
    StepLoss,
    adjoint,
    alone,
    descend,
)
from stillhouse.distillation.augment import AugmentDraw, augment, draw_augmentation
from stillhouse.distillation.recipes import Group, ProtocolName
from stillhouse.distillation.spec import DistillSpec, ExpertSettings, Method
from stillhouse.errors import SpecError
from stillhouse.spec import Count

_Positive = Annotated[float, Field(gt=0)]
_MAX_START = 20
StartFrom = Literal["random_real", "representative", "right"]


@dataclass(frozen=True, slots=True)
class SyntheticSet:
    """What is learned: images [S, C, H, W], a label each, and the step size eta to train with.

    `labels` are classes (int64 [S]), or the logits of soft labels (float [S, K]), which are then
    learned as well.
    """

    images: Tensor
    labels: Tensor
    learning_rate: Tensor

    @property
    def soft(self) -> bool:
        return self.labels.is_floating_point()


@dataclass(frozen=True, slots=True)
class StepImages:
    """An inner step's rows of images, their augmentation, and the worker's share of the batch."""

    rows: Tensor
    draw: AugmentDraw | None = None
    share: float = 1.0

    def part(self, rank: int, size: int) -> "StepImages":
        """The part of worker `rank` of `size`; the parts' losses add up to the batch's.

        Not for batch norm, whose statistics are those of the whole batch.
        """
        count = len(self.rows)
        own = slice(count * rank // size, count * (rank + 1) // size)
        draw = None if self.draw is None else self.draw.part(own)
        return StepImages(self.rows[own], draw, self.share * (own.stop - own.start) / count)


@dataclass(frozen=True, slots=True)
class Match:
    """Where the student should be after `step` inner steps: `target` [P], weighted."""

    step: int
    target: Tensor
    weight: float = 1.0


def draw_batches(
    num_images: int,
    batch_size: int,
    num_steps: int,
    image_size: int,
    groups: Sequence[Group],
    generator: torch.Generator,
) -> tuple[StepImages, ...]:
    """Batches of `num_steps` inner steps, augmented by DSA's `groups`, if any.

    Permutations of all images are cut into chunks, which are used from the last one on.
    """
    batches: list[StepImages] = []
    chunks: list[Tensor] = []
    for _ in range(num_steps):
        if not chunks:
            chunks = list(torch.randperm(num_images, generator=generator).split(batch_size))
        rows = chunks.pop()
        draw = draw_augmentation(groups, len(rows), image_size, generator) if groups else None
        batches.append(StepImages(rows, draw))
    return tuple(batches)


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits [B, K] to classes [B], or to softmax of label logits [B, K]."""
    if labels.is_floating_point():
        return -(labels.softmax(1) * logits.log_softmax(1)).sum(1).mean()
    return cross_entropy(logits, labels)


def inner_loss(
    network: FlatModule,
    synthetic: SyntheticSet,
    batches: Sequence[StepImages],
    scale: float = 1.0,
) -> StepLoss:
    """The student's loss at inner step n (on batch n) and theta [P], times `scale`."""

    def loss(step: int, theta: Tensor) -> Tensor:
        batch = batches[step]
        images = synthetic.images[batch.rows]
        if batch.draw is not None:
            images = augment(images, batch.draw)
        value = label_loss(network(theta, images), synthetic.labels[batch.rows])
        return value * (scale * batch.share)

    return loss


def matching_objective(
    start: Tensor, matches: Sequence[Match]
) -> Callable[[int, Tensor], Tensor | None]:
    """The adjoint's objective: weighted matching losses L at the matches' steps."""
    by_step = {match.step: match for match in matches}

    def objective(step: int, theta: Tensor) -> Tensor | None:
        match = by_step.get(step)
        if match is None:
            return None
        distance = (start - match.target).square().sum()
        return (theta - match.target).square().sum() / distance * match.weight

    return objective


def matching_gradients(
    network: FlatModule,
    synthetic: SyntheticSet,
    batches: Sequence[StepImages],
    start: Tensor,
    matches: Sequence[Match],
    *,
    momentum: float = 0.0,
    loss_scale: float = 1.0,
    first_order: bool = False,
    all_reduce: Callable[[Tensor], Tensor] = alone,
) -> tuple[Gradients, Run]:
    """The gradients of the weighted sum of matching losses, and the student's run.

    Leaves are the images, then soft labels; `terms` maps a match's step to its loss.

    Args:
        network: the student.
        synthetic: the set, on the device of `start`.
        batches: of the N inner steps.
        start: theta_0 [P].
        matches: one at step N, others at earlier steps.
        momentum: of the student (AST: 0.9).
        loss_scale: factor of the inner loss (AST's balance).
        first_order: TESLA's gradient.
        all_reduce: as in `Descent`, with one worker's part of each batch; gradients of leaves are
            then this worker's shares.
    """
    images = synthetic.images.detach().requires_grad_()
    labels = synthetic.labels.detach().requires_grad_(synthetic.soft)
    leaves = [images, labels] if synthetic.soft else [images]
    learned = SyntheticSet(images, labels, synthetic.learning_rate)
    loss = inner_loss(network, learned, batches, loss_scale)
    descent = Descent(loss, synthetic.learning_rate, momentum, all_reduce)
    run = descend(descent, start, len(batches))
    objective = matching_objective(start, matches)
    return adjoint(descent, run.states, objective, leaves, first_order=first_order), run


class TrajectoryMethod(Method):
    """Synthetic images on which a student follows the trajectory of experts."""

    matching: ClassVar[bool] = True
    protocol: ClassVar[ProtocolName] = "p1"
    experts: ClassVar[Literal["plain", "smooth", "flat"]] = "plain"
    """What `experts.smoothing: auto` stands for."""
    first_order: ClassVar[bool] = False
    """Whether gradients are TESLA's, not exact."""

    num_iterations: Count = Field(default=5_000, description="updates of the images")
    num_steps: Count = Field(default=30, description="N, steps of the student an iteration")
    expert_epochs: Count = Field(default=2, description="M, epochs of an expert to catch up with")
    min_start_epoch: Annotated[int, Field(ge=0)] = 0
    max_start_epoch: Count | None = Field(
        default=None,
        description="students start at epochs before this one; default 20, less where `experts` "
        "have fewer epochs",
    )
    batch_size: Count | None = Field(default=None, description="of a student's step; default all")
    image_rate: _Positive = Field(default=100.0, description="step size of the images")
    step_size_rate: Annotated[float, Field(ge=0)] = Field(
        default=1e-5, description="step size of the learned learning rate"
    )
    learning_rate: _Positive = Field(
        default=0.01, description="the student's at first; it is learned with the images"
    )
    student_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    max_loss: _Positive | None = Field(
        default=None, description="an iteration of greater or no finite loss is skipped"
    )
    start_from: StartFrom = Field(
        default="random_real",
        description="real images: random, of clusters, or such that an expert gets right",
    )
    soft_labels: bool = Field(default=False, description="labels are learned as well (DATM)")
    label_rate: _Positive = Field(default=2.0, description="step size of soft labels")
    evaluate_every: Count | None = Field(
        default=None,
        description="iterations between the sets that are compared on the validation part; "
        "default a tenth of all",
    )
    stored_as: Literal["uint8", "float32"] = Field(
        default="uint8",
        description="uint8: 256 levels between the images' own least and greatest value",
    )

    @property
    def interval(self) -> int:
        """Iterations between two stored sets."""
        return self.evaluate_every or max(1, self.num_iterations // 10)

    @property
    def snapshots(self) -> list[int]:
        """Iterations after which the set is stored, 0 included."""
        return [*range(0, self.num_iterations, self.interval), self.num_iterations]

    @property
    def image_decay(self) -> float | None:
        """Decay of the running average of the images that is delivered; None: the images."""
        return None

    @property
    def label_kind(self) -> str:
        return "logits" if self.soft_labels else "classes"

    @property
    def matched_epochs(self) -> range:
        """Epochs after the start whose parameters are matched."""
        return range(self.expert_epochs, self.expert_epochs + 1)

    def window_end(self, num_epochs: int, iteration: int | None = None) -> int:
        """The end (exclusive) of the start epochs at an iteration, by default the last one."""
        last = max(1, num_epochs - self.expert_epochs + 1)
        return self.max_start_epoch or min(_MAX_START, last)

    def start(self, theta: Tensor, network: FlatModule, generator: torch.Generator) -> Tensor:
        """The student's start for an expert's theta [P]."""
        return theta

    def loss_scale(self, start_epoch: int, num_epochs: int) -> float:
        """Factor of the student's loss."""
        return 1.0

    def matches(self, targets: Sequence[Tensor]) -> tuple[Match, ...]:
        """The matches for an expert's parameters after each of `matched_epochs`."""
        return (Match(self.num_steps, targets[-1]),)

    def epochs_read(self, num_epochs: int) -> list[int]:
        """The epochs of an expert that may be read: starts and targets."""
        starts = range(self.min_start_epoch, self.window_end(num_epochs))
        return sorted({start + ahead for start in starts for ahead in (0, *self.matched_epochs)})

    def epochs_kept(self, settings: ExpertSettings) -> tuple[int, ...]:
        """The epochs of an expert to store; the last one where it chooses images or labels."""
        if settings.keep == "all":
            return tuple(range(settings.epochs + 1))
        end = self.window_end(settings.epochs) - 1 + self.expert_epochs
        last = {settings.epochs} if self.start_from != "random_real" or self.soft_labels else set()
        return tuple(sorted({*range(self.min_start_epoch, end + 1)} | last))

    def check_spec(self, spec: DistillSpec) -> None:
        experts = spec.experts or ExpertSettings()
        if experts.path is None:
            self.check_window(experts.epochs)

    def check_window(self, num_epochs: int) -> None:
        """Refuse starts and targets outside the experts' epochs.

        Raises:
            SpecError: no start epoch is left, or the last target is after the last epoch.
        """
        end = self.window_end(num_epochs)
        if self.min_start_epoch >= end:
            raise SpecError(
                f"no start epoch lies in [{self.min_start_epoch}, {end}): raise "
                "`method.max_start_epoch` or lower `method.min_start_epoch`"
            )
        if end - 1 + self.expert_epochs > num_epochs:
            raise SpecError(
                f"a start at epoch {end - 1} and {self.expert_epochs} epochs more lead beyond the "
                f"experts' {num_epochs}: lower `method.max_start_epoch` or raise `experts.epochs`"
            )
