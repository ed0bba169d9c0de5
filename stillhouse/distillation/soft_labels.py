"""DATM's soft labels: which real images to start from, and the label logits they start with.

Guo et al. 2024: start from images that an expert of a late epoch gets right; an image's label is
softmax of the logits that the experts which get it right give on average.
"""

import torch
from torch import Tensor

from stillhouse.errors import InputError


def choose_right(
    logits: Tensor, labels: Tensor, images_per_class: int, generator: torch.Generator
) -> Tensor:
    """Rows of `images_per_class` random images of each class that an expert gets right.

    Where too few are right, wrong ones fill up. Classes follow one another.

    Args:
        logits: the expert's, [N, K].
        labels: classes, [N].
        images_per_class: of each of the K classes.
        generator: of the CPU.

    Raises:
        InputError: a class has fewer images.
    """
    right = (logits.argmax(1) == labels).cpu()
    chosen: list[Tensor] = []
    for label in range(logits.shape[1]):
        rows = (labels.cpu() == label).nonzero()[:, 0]
        if len(rows) < images_per_class:
            raise InputError(
                f"class {label} has {len(rows)} training images, fewer than the {images_per_class} "
                "asked for: lower `method.images_per_class`"
            )
        rows = rows[torch.randperm(len(rows), generator=generator)]
        wrong_last = (~right[rows]).int().argsort(stable=True)
        chosen.append(rows[wrong_last[:images_per_class]])
    return torch.cat(chosen)


def label_logits(expert_logits: Tensor, labels: Tensor) -> Tensor:
    """Start of the label logits [S, K] from E experts' logits on the images [E, S, K].

    The mean over the experts that are right; over all of them where none is (the release divides
    by zero there).
    """
    right = expert_logits.argmax(2) == labels
    votes = torch.where(right.any(0), right, True).to(expert_logits.dtype)[:, :, None]
    return (expert_logits * votes).sum(0) / votes.sum(0)
