"""AST: experts that a short student can follow, and five changes to the student.

Shen, Yang & Lam, "Efficient Dataset Distillation through Alignment with Smooth and High-Quality
Expert Trajectories" (arXiv 2310.10541), as its released code computes it. Experts: the loss is
ramped up over ten epochs (the paper's clipping loss) and a gradient penalty smooths them. Student:
representative start images, a loss balanced by the start epoch, momentum, matches at steps in
between, and a start that is perturbed.
"""

from collections.abc import Callable, Sequence
from math import log

import torch
from torch import Tensor

from stillhouse.distillation.trajectory import Match

NUM_CLUSTERS = 10  # of a class's images, from which the representative ones are taken
RAMP_EPOCHS = 10
PENALTY_WEIGHT = 2.0
_LLOYD_ITERATIONS = 100


def clip_factor(epoch: int, ramp_epochs: int = RAMP_EPOCHS) -> float:
    """Times the expert's cross-entropy in `epoch` (from 0): 0.50, 0.55, ..., 0.95, then 1."""
    return min(1.0, 0.5 + 0.5 * epoch / ramp_epochs) if ramp_epochs else 1.0


def gradient_penalty(
    network: Callable[[Tensor], Tensor], images: Tensor, weight: float = PENALTY_WEIGHT
) -> Tensor:
    """weight * mean over n, h, w of (||g||_c - 1)^2, g = d(sum of all logits)/d images [B,C,H,W].

    The norm runs over the channels of a pixel. Keeps its graph: differentiate it again for the
    parameters that `network` uses.
    """
    inputs = images.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(network(inputs).sum(), inputs, create_graph=True)
    norms = torch.linalg.vector_norm(gradient, dim=1)
    return weight * (norms - 1).square().mean()


def balance_factor(start_epoch: int, max_start_epoch: int) -> float:
    """Times the student's loss: with h = max_start_epoch // 2, log_5(t - h + 8) from t = h on.

    Before it 1 / log_5(h - t + 8): early segments, of large gradients, are damped.
    """
    late = start_epoch - max_start_epoch // 2
    factor = log(abs(late) + 8, 5)
    return factor if late >= 0 else 1 / factor


def perturb(
    theta: Tensor, shapes: Sequence[Sequence[int]], noise: Tensor, alpha: float = 1.0
) -> Tensor:
    """The start [P] with its convolution weights moved: W + alpha (D / ||D||_F) W elementwise.

    `shapes` are those of the parameters in theta, `noise` [P] holds D ~ N(0, 1); what belongs to
    other than four-dimensional tensors is not read.
    """
    sizes = [torch.Size(shape).numel() for shape in shapes]
    moved: list[Tensor] = []
    for shape, weight, draws in zip(shapes, theta.split(sizes), noise.split(sizes), strict=True):
        moved.append(weight + alpha * draws / draws.norm() * weight if len(shape) == 4 else weight)
    return torch.cat(moved)


def segment_matches(
    targets: Sequence[Tensor], num_steps: int, *, intermediate: bool = True, graded: bool = False
) -> tuple[Match, ...]:
    """Matches of one segment: the last target at step N, target i of M at step i * (N // M).

    Args:
        targets: expert[t+1]..expert[t+M], each [P].
        num_steps: N.
        intermediate: match the targets before the last.
        graded: weigh target i by i / M, instead of by 1; the last always by 1.
    """
    count = len(targets)
    between = [
        Match(i * (num_steps // count), targets[i - 1], i / count if graded else 1.0)
        for i in range(1, count)
    ]
    return (*(between if intermediate else []), Match(num_steps, targets[-1]))


def nearest_rows(features: Tensor, centres: Tensor, per_centre: int) -> Tensor:
    """Rows of features [N, K] nearest to each of the centres [J, K]: int64 [J, per_centre].

    Euclidean distance, nearest first, ties by row; one row may serve several centres.
    """
    distances = torch.cdist(centres, features)
    return distances.argsort(dim=1, stable=True)[:, :per_centre]


def representative_rows(
    logits: Tensor, images_per_class: int, generator: torch.Generator
) -> Tensor:
    """Rows of one class's images to start from: different, near the centres of its clusters.

    The release takes images_per_class // 10 rows for each of 10 centres, which are none for fewer
    than 10 images. Here min(10, images_per_class) centres take turns, each its nearest free row.

    Args:
        logits: [N, K], of an expert's last epoch on the class's images; N >= images_per_class.
        images_per_class: how many rows.
        generator: draws the first centres.
    """
    centres = k_means(logits, min(NUM_CLUSTERS, images_per_class), generator)
    queues = nearest_rows(logits, centres, len(logits)).tolist()
    taken: dict[int, None] = {}  # in the order they were taken
    while len(taken) < images_per_class:
        for queue in queues[: images_per_class - len(taken)]:
            taken[next(row for row in queue if row not in taken)] = None
    return torch.tensor(list(taken))


def k_means(features: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """Centres [J, K] of features [N, K] by Lloyd's iterations from k-means++ starts."""
    first = torch.randint(len(features), (), generator=generator)
    centres = features[first][None]
    while len(centres) < num_clusters:
        away = torch.cdist(features, centres).amin(1).square().cpu() + 1e-30
        row = int(torch.multinomial(away, 1, generator=generator))
        centres = torch.cat([centres, features[row][None]])
    for _ in range(_LLOYD_ITERATIONS):
        nearest = torch.cdist(features, centres).argmin(1)
        members = torch.nn.functional.one_hot(nearest, num_clusters).to(features.dtype)
        counts = members.sum(0)[:, None]
        moved = torch.where(counts > 0, members.T @ features / counts.clamp(min=1), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres
