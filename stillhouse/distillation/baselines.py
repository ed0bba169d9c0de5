"""What distilled sets are compared with: real images, chosen without any synthesis.

All return rows of the training set, class by class, `num_per_class` each.
"""

import numpy as np
from numpy.typing import NDArray

from stillhouse.errors import InputError

Rows = NDArray[np.int64]
Features = NDArray[np.floating]


def random_real(labels: NDArray[np.integer], num_per_class: int, *, seed: int) -> Rows:
    """Random images of each class.

    Raises:
        InputError: a class has fewer images.
    """
    rng = np.random.default_rng(seed)
    return np.concatenate(
        [rng.permutation(rows)[:num_per_class] for rows in _by_class(labels, num_per_class)]
    )


def herding(features: Features, labels: NDArray[np.integer], num_per_class: int) -> Rows:
    """Greedily, the images that keep the mean of the chosen nearest to the class's mean.

    Features [N, D], a network's or pixels (Welling 2009; iCaRL's form, each image once). Ties fall
    to the first image.

    Raises:
        InputError: a class has fewer images.
    """
    chosen: list[Rows] = []
    for rows in _by_class(labels, num_per_class):
        own = features[rows].astype(np.float64)
        mean, total = own.mean(0), np.zeros(own.shape[1])
        free = np.ones(len(rows), bool)
        picked: list[int] = []
        for count in range(1, num_per_class + 1):
            distance = np.square((total + own) / count - mean).sum(1)
            picked.append(int(np.where(free, distance, np.inf).argmin()))
            free[picked[-1]] = False
            total += own[picked[-1]]
        chosen.append(rows[picked])
    return np.concatenate(chosen)


def k_centre(features: Features, labels: NDArray[np.integer], num_per_class: int) -> Rows:
    """Greedily, the image farthest from all chosen of its class; first the one nearest the mean.

    Within twice the best covering radius (Gonzalez 1985; Sener and Savarese 2018). Ties fall to the
    first image.

    Raises:
        InputError: a class has fewer images.
    """
    chosen: list[Rows] = []
    for rows in _by_class(labels, num_per_class):
        own = features[rows].astype(np.float64)
        picked = [int(np.square(own - own.mean(0)).sum(1).argmin())]
        distance = np.square(own - own[picked[0]]).sum(1)
        while len(picked) < num_per_class:
            distance[picked] = -1  # copies of a chosen image are still worth more than itself
            picked.append(int(distance.argmax()))
            distance = np.minimum(distance, np.square(own - own[picked[-1]]).sum(1))
        chosen.append(rows[picked])
    return np.concatenate(chosen)


def _by_class(labels: NDArray[np.integer], num_per_class: int) -> list[Rows]:
    groups = [np.flatnonzero(labels == label) for label in range(int(labels.max()) + 1)]
    for label, rows in enumerate(groups):
        if len(rows) < num_per_class:
            raise InputError(
                f"class {label} has {len(rows)} training images, {num_per_class} are needed: lower "
                "`method.images_per_class`"
            )
    return groups
