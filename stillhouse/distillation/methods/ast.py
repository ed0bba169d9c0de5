"""AST: experts that a short student can follow, and five changes to the student.

Shen, Yang & Lam, "Efficient Dataset Distillation through Alignment with Smooth and High-Quality
Expert Trajectories" (arXiv 2310.10541), as its released code computes it. Experts: the loss is
ramped up over ten epochs (the paper's clipping loss) and a gradient penalty smooths them. Student:
representative start images (`stillhouse.distillation.real_images`), a loss balanced by the start
epoch, momentum, matches at steps in between, and a start that is perturbed.
"""

from collections.abc import Callable, Sequence
from math import log
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from stillhouse.distillation.adjoint import FlatModule
from stillhouse.distillation.matching import Match, StartFrom, TrajectoryMethod
from stillhouse.distillation.spec import DistillSpec
from stillhouse.errors import SpecError


class Ast(TrajectoryMethod):
    """Smooth experts and five changes to the student (Shen et al. 2023)."""

    experts: ClassVar[Literal["plain", "smooth", "flat"]] = "smooth"
    image_rate: Annotated[float, Field(gt=0)] = 1_000.0
    student_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    start_from: StartFrom = "representative"
    intermediate: bool = Field(default=True, description="match the epochs in between as well")
    graded: bool = Field(default=True, description="weigh the match of epoch i of M by i / M")
    balanced: bool = Field(default=True, description="the student's loss grows with the epoch")
    perturbed: bool = Field(default=True, description="the student starts a little beside")

    def check_spec(self, spec: DistillSpec) -> None:
        super().check_spec(spec)
        if self.intermediate and self.num_steps < self.expert_epochs:
            raise SpecError(
                f"`method.num_steps` {self.num_steps} is below `method.expert_epochs` "
                f"{self.expert_epochs}: there is no step for each epoch's match: raise it, or set "
                "`method.intermediate: false`"
            )

    @property
    def matched_epochs(self) -> range:
        return range(1 if self.intermediate else self.expert_epochs, self.expert_epochs + 1)

    def start(self, theta: Tensor, network: FlatModule, generator: torch.Generator) -> Tensor:
        if not self.perturbed:
            return theta
        noise = torch.randn(len(theta), generator=generator).to(theta)
        return perturb(theta, network.shapes, noise)

    def loss_scale(self, start_epoch: int, num_epochs: int) -> float:
        return balance_factor(start_epoch, self.window_end(num_epochs)) if self.balanced else 1.0

    def matches(self, targets: Sequence[Tensor]) -> tuple[Match, ...]:
        """The last target at step N, target i of M at step i * (N // M)."""
        count = len(targets)
        between = [
            Match(i * (self.num_steps // count), targets[i - 1], i / count if self.graded else 1.0)
            for i in range(1, count)
        ]
        return (*between, Match(self.num_steps, targets[-1]))


def balance_factor(start_epoch: int, max_start_epoch: int) -> float:
    """Factor of the student's loss, which damps early segments with their large gradients.

    With h = max_start_epoch // 2: log_5(t - h + 8) from t = h on, 1 / log_5(h - t + 8) before.
    """
    late = start_epoch - max_start_epoch // 2
    factor = log(abs(late) + 8, 5)
    return factor if late >= 0 else 1 / factor


def perturb(
    theta: Tensor, shapes: Sequence[Sequence[int]], noise: Tensor, alpha: float = 1.0
) -> Tensor:
    """theta [P] with convolution weights moved to W + alpha (D / ||D||_F) W elementwise.

    `shapes` are those of the parameters in theta; `noise` [P] holds D ~ N(0, 1) and is read only
    for four-dimensional tensors.
    """
    sizes = [torch.Size(shape).numel() for shape in shapes]
    moved: list[Tensor] = []
    for shape, weight, draws in zip(shapes, theta.split(sizes), noise.split(sizes), strict=True):
        moved.append(weight + alpha * draws / draws.norm() * weight if len(shape) == 4 else weight)
    return torch.cat(moved)


def clip_factor(epoch: int, ramp_epochs: int = 10) -> float:
    """Factor of the expert's cross-entropy in `epoch` (from 0): 0.50, 0.55, ..., 0.95, then 1."""
    return min(1.0, 0.5 + 0.5 * epoch / ramp_epochs) if ramp_epochs else 1.0


def gradient_penalty(
    network: Callable[[Tensor], Tensor], images: Tensor, weight: float = 2.0
) -> Tensor:
    """weight * mean over n, h, w of (||g||_c - 1)^2, g = d(sum of all logits)/d images [B,C,H,W].

    The norm is over the channels of a pixel. The graph is kept for the parameters' gradient.
    """
    inputs = images.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(network(inputs).sum(), inputs, create_graph=True)
    norms = torch.linalg.vector_norm(gradient, dim=1)
    return weight * (norms - 1).square().mean()
