"""Pictures for the report: sets along the way, and the real images they began as."""

from dataclasses import dataclass

import pyarrow as pa
import torch

from stillhouse.distillation.baselines import random_real
from stillhouse.distillation.decoupled_job import unit_images
from stillhouse.distillation.prepared import Prepared
from stillhouse.distillation.stored_sets import png_bytes, read_set
from stillhouse.storage.artifact import Store
from stillhouse.storage.parquet import read_table

REAL = -1
"""In place of a point: real images of the class."""


@dataclass(frozen=True, slots=True)
class Shown:
    """Which sets to draw: (iteration, path of the set's part), and how many images of a class.

    With `real`, real images of each class come first, as point `REAL`: those at the paths `starts`,
    by class, or random training images.
    """

    points: tuple[tuple[int, str], ...]
    per_class: int
    real: bool
    starts: tuple[str, ...] = ()


def pictures(store: Store, prepared: Prepared, shown: Shown) -> pa.Table:
    """Rows of point, label and png."""
    rows: list[dict[str, object]] = []
    if shown.real and shown.starts:
        for label, path in enumerate(shown.starts):
            first = unit_images(store, path, prepared.shape)[: shown.per_class]
            rows += _rows(REAL, prepared, first, torch.full((len(first),), label))
    elif shown.real:
        labels = prepared.train_labels.cpu()
        least = int(torch.bincount(labels).min())
        chosen = random_real(labels.numpy(), min(shown.per_class, least), seed=0)
        there = torch.from_numpy(chosen)
        rows += _rows(REAL, prepared, prepared.train[there.to(prepared.device)], labels[there])
    for iteration, path in shown.points:
        given = read_set(read_table(store.path(path)), path)
        firsts = torch.cat(
            [
                (given.labels == label).nonzero()[: shown.per_class, 0]
                for label in range(prepared.num_classes)
            ]
        )
        rows += _rows(iteration, prepared, given.images[firsts], given.labels[firsts])
    return pa.Table.from_pylist(rows)


def _rows(
    point: int, prepared: Prepared, images: torch.Tensor, labels: torch.Tensor
) -> list[dict[str, object]]:
    pngs = png_bytes(prepared.pixels(images.cpu()))
    return [
        {"point": point, "label": label, "png": png}
        for label, png in zip(labels.tolist(), pngs, strict=True)
    ]
