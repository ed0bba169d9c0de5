"""Choosing real images: for baselines of equal bytes, and to start distillations from.

Baselines are random, herding and k-centre; starts are representative of clusters (AST), or such
that an expert classifies correctly (DATM). All functions return rows of the training set, class by
class, and raise InputError where a class has too few images.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stillhouse.errors import InputError

Rows = NDArray[np.int64]
Features = NDArray[np.floating]
NUM_CLUSTERS = 10
_LLOYD_ITERATIONS = 100


def random_real(labels: NDArray[np.integer], num_per_class: int, *, seed: int) -> Rows:
    rng = np.random.default_rng(seed)
    return np.concatenate(
        [rng.permutation(rows)[:num_per_class] for rows in _by_class(labels, num_per_class)]
    )


def herding(features: Features, labels: NDArray[np.integer], num_per_class: int) -> Rows:
    """Greedily, the images that keep the mean of the chosen nearest to the class's mean.

    Features [N, D] are a network's or pixels (Welling 2009; iCaRL's form, each image once). Ties
    go to the first image.
    """

    def choose(points: Features) -> list[int]:
        mean, total = points.mean(0), np.zeros(points.shape[1])
        free = np.ones(len(points), bool)
        chosen: list[int] = []
        for count in range(1, num_per_class + 1):
            distance = np.square((total + points) / count - mean).sum(1)
            chosen.append(int(np.where(free, distance, np.inf).argmin()))
            free[chosen[-1]] = False
            total += points[chosen[-1]]
        return chosen

    return _of_each_class(choose, features, labels, num_per_class)


def k_centre(features: Features, labels: NDArray[np.integer], num_per_class: int) -> Rows:
    """Greedily, the image farthest from all chosen of its class, first the one nearest the mean.

    Within twice the best covering radius (Gonzalez 1985; Sener and Savarese 2018). Ties go to the
    first image.
    """

    def choose(points: Features) -> list[int]:
        chosen = [int(np.square(points - points.mean(0)).sum(1).argmin())]
        distance = np.square(points - points[chosen[0]]).sum(1)
        while len(chosen) < num_per_class:
            distance[chosen] = -1  # a copy of a chosen image still comes before the image itself
            chosen.append(int(distance.argmax()))
            distance = np.minimum(distance, np.square(points - points[chosen[-1]]).sum(1))
        return chosen

    return _of_each_class(choose, features, labels, num_per_class)


def _of_each_class(
    choose: Callable[[Features], list[int]],
    features: Features,
    labels: NDArray[np.integer],
    num_per_class: int,
) -> Rows:
    classes = _by_class(labels, num_per_class)
    return np.concatenate([rows[choose(features[rows].astype(np.float64))] for rows in classes])


def _by_class(labels: NDArray[np.integer], num_per_class: int) -> list[Rows]:
    classes = [np.flatnonzero(labels == label) for label in range(int(labels.max()) + 1)]
    for label, rows in enumerate(classes):
        if len(rows) < num_per_class:
            raise InputError(
                f"class {label} has {len(rows)} training images, {num_per_class} are needed: lower "
                "`method.images_per_class`"
            )
    return classes


def without_last(by_class: Rows, num_images: int, seed: int) -> Rows:
    """`num_images` of rows [num_classes, n]; randomly drawn classes lose their last row."""
    order = np.random.default_rng(seed).permutation(len(by_class))
    kept = np.ones(by_class.shape, bool)
    kept[order[: by_class.size - num_images], -1] = False
    return by_class[kept]


def representative(
    logits: Tensor, labels: Tensor, num_per_class: int, generator: torch.Generator
) -> Tensor:
    """`representative_rows` of each class; logits [N, K] of an expert's last epoch, labels [N]."""
    chosen: list[Tensor] = []
    for rows in map(torch.from_numpy, _by_class(labels.cpu().numpy(), num_per_class)):
        of_class = logits[rows.to(logits.device)].cpu()
        chosen.append(rows[representative_rows(of_class, num_per_class, generator)])
    return torch.cat(chosen)


def representative_rows(
    logits: Tensor, images_per_class: int, generator: torch.Generator
) -> Tensor:
    """Distinct rows of one class's logits [N, K], near the centres of its clusters.

    AST's release takes images_per_class // 10 rows for each of 10 centres: none below 10 images.
    Here min(10, images_per_class) centres take turns, each its nearest free row.
    """
    centres = k_means(logits, min(NUM_CLUSTERS, images_per_class), generator)
    nearest = torch.cdist(centres, logits).argsort(dim=1, stable=True).tolist()
    chosen: dict[int, None] = {}  # ordered
    while len(chosen) < images_per_class:
        for rows in nearest[: images_per_class - len(chosen)]:
            chosen[next(row for row in rows if row not in chosen)] = None
    return torch.tensor(list(chosen))


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


def choose_right(
    logits: Tensor, labels: Tensor, images_per_class: int, generator: torch.Generator
) -> Tensor:
    """Random images of each class, first those that an expert's logits [N, K] get right."""
    right = (logits.argmax(1) == labels).cpu()
    chosen: list[Tensor] = []
    for rows in map(torch.from_numpy, _by_class(labels.cpu().numpy(), images_per_class)):
        rows = rows[torch.randperm(len(rows), generator=generator)]
        wrong_last = (~right[rows]).int().argsort(stable=True)
        chosen.append(rows[wrong_last[:images_per_class]])
    return torch.cat(chosen)
