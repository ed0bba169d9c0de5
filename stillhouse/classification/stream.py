"""A worker's share of every global batch of images, in the order of `SampleOrder`.

All images are in memory, preprocessed. A sample of the order is an image, or a bag of images that
are known together only: then bags, made once from the seed, are what is shuffled and shared out.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stillhouse.distillation.augment import crop, flip
from stillhouse.training.order import SampleOrder, Window
from stillhouse.training.stream import Batch, OrderedStream

_BAGS, _VIEWS, _CHOICE = 10, 11, 12  # first word of a random generator's key
_SHIFT = 0.125  # of the side


def bags_of(num_images: int, size: int, seed: int) -> NDArray[np.int64]:
    """Rows of disjoint random bags: int64 [num_images // size, size]; what is left is in none."""
    if size == 1:
        return np.arange(num_images)[:, None]
    rows = np.random.default_rng([_BAGS, seed]).permutation(num_images)
    return rows[: num_images // size * size].reshape(-1, size)


class ImageStream(OrderedStream):
    """The images of one worker's lanes.

    Args:
        order: of bags, or of labelled images and unlabelled ones.
        images: float32 [N, C, H, W] on the CPU; unlabelled ones last.
        columns: signals of every image, [N] or [N, m], by name; of every view of it [N, views, m].
        bags: rows of every sample of the order, [samples, size]; those of each data set in turn.
        augmentation: `flip`, `crop`; drawn by seed, step and row.
        views: so many are drawn of each image once, of which every step shows one; None for a new
            one in every step.
    """

    def __init__(
        self,
        order: SampleOrder,
        images: Tensor,
        columns: Mapping[str, Tensor],
        bags: NDArray[np.int64],
        *,
        rank: int = 0,
        num_workers: int = 1,
        augmentation: tuple[str, ...] = (),
        views: int | None = None,
    ) -> None:
        super().__init__(order, rank=rank, num_workers=num_workers)
        self._images, self._columns, self._bags = images, columns, bags
        self._augmentation, self._views = augmentation, views
        self._current: dict[tuple[int, int], tuple[Window, NDArray[np.int64]]] = {}

    def _assemble(self, step: int) -> Batch:
        width = self._order.rows_per_lane
        samples = [
            self._sample(int(dataset), lane, int(position))
            for lane in self._lanes
            for dataset, position in zip(
                *self._order.mixture.draws(lane, step * width, width), strict=True
            )
        ]
        rows = self._bags[samples].reshape(-1)
        index = torch.from_numpy(rows)
        images, seed = self._images[index], self._order.seed
        numbers = np.full_like(rows, step)
        if self._views is not None:
            numbers = views_of(rows, seed, step, self._views)
        if self._augmentation:
            images = augmented(images, rows, self._augmentation, seed, numbers)
        parts = np.stack([np.zeros_like(rows), rows], axis=1)
        view = torch.from_numpy(numbers)
        signals = {
            name: values[index] if values.ndim < 3 else values[index, view]
            for name, values in self._columns.items()
        }
        return Batch(images, parts, signals=signals)

    def _sample(self, dataset: int, lane: int, position: int) -> int:
        """The sample at a `position` of a data set's lane, counted over all epochs."""
        window, rows = self._current.get((dataset, lane), (None, None))
        if window is None or rows is None or not window.start <= position < window.end:
            window = self._order.window_at(dataset, lane, position)
            rows = window.samples()[window.permutation(), 1] + self._order.rows_before(dataset)
            self._current[dataset, lane] = window, rows
        return int(rows[position - window.start])


def views_of(rows: NDArray[np.int64], seed: int, step: int, count: int) -> NDArray[np.int64]:
    """The view of each row [B] that a step shows, of `count`."""
    draws = (np.random.default_rng([_CHOICE, seed, step, int(row)]) for row in rows)
    return np.array([draw.integers(count) for draw in draws], np.int64)


def augmented(
    images: Tensor,
    rows: NDArray[np.int64],
    kinds: tuple[str, ...],
    seed: int,
    numbers: NDArray[np.int64],
) -> Tensor:
    """Images [B, C, H, W] of rows [B], each drawn by itself: the same on any number of workers.

    Args:
        numbers: of each image's view [B]: the step, or one of a fixed number of views.
    """
    side = images.shape[-1]
    most = int(side * _SHIFT + 0.5)
    keys = zip(numbers.tolist(), rows.tolist(), strict=True)
    draws = [np.random.default_rng([_VIEWS, seed, number, row]) for number, row in keys]
    if "crop" in kinds:
        shifts = np.stack([draw.integers(-most, most + 1, 2) for draw in draws])
        images = crop(images, *torch.from_numpy(shifts).T)
    if "flip" in kinds:
        images = flip(images, torch.tensor([draw.random() for draw in draws]))
    return images
