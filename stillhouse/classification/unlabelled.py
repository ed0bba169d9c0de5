"""Images without labels, beside those of a training: read, checked, and kept in the store."""

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from stillhouse.distillation.image_files import (
    IMAGE_SUFFIXES,
    DeadImage,
    Pixels,
    RawImage,
    list_source,
    read_images,
    read_parquet,
)
from stillhouse.distillation.image_sources import check_dead, stacked
from stillhouse.errors import InputError
from stillhouse.spec import Settings
from stillhouse.storage.artifact import PartRef, Store
from stillhouse.storage.parquet import read_table
from stillhouse.storage.task import Output, Place, Task

if TYPE_CHECKING:
    from torch import Tensor

    from stillhouse.distillation.prepared import ImageHost, Prepared

UNLABELLED = "unlabelled images"
"""The step's name."""


class UnlabelledImages(Settings):
    """Images whose labels are not known, or not read; they may be of another domain."""

    path: str = Field(description="a folder of images, at any depth, or Parquet; any fsspec URI")
    image_column: str = Field(default="image", description="Parquet: the encoded images")
    share: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.5, description="of every batch; the rest are labelled images"
    )
    max_bad_rows: Annotated[float, Field(ge=0)] = Field(
        default=0.01,
        description="broken images allowed: a share below 1, a count from 1; more stops the run",
    )


@dataclass(frozen=True, slots=True)
class UnlabelledSet:
    """The images in the store, and their share of every batch."""

    part: PartRef
    share: float

    def images(self, store: Store, prepared: "Prepared") -> "Tensor":
        """float32 [N, C, H, W], standardised as the labelled images are."""
        import torch

        from stillhouse.distillation.stored_sets import flat_values

        values = flat_values(read_table(store.path(self.part.path)), "pixels")
        pixels = torch.from_numpy(values.reshape(-1, *prepared.shape)).float() / 255
        return prepared.standardisation.apply(pixels)


@dataclass(frozen=True)
class UnlabelledTask(Task):
    """Reads and checks the images; its part has a row an image, `pixels` as labelled ones have.

    Attributes:
        images: fingerprint of the labelled images, whose size and channels are theirs too.
        content: fingerprint of the files and of how they are read.
        side: that images are resized to.
    """

    KIND: ClassVar[str] = "images"

    images: str
    content: str
    side: int | None
    source: Place[UnlabelledImages]

    def run(self, store: Store, host: "ImageHost", loaded: object = None) -> Output:
        """The pixels, and what could not be read as `dead_letters`.

        Raises:
            InputError: too many broken images, several sizes, or not those of the labelled ones.
        """
        from stillhouse.distillation.stored_sets import lists

        pixels, dead = read_pixels(self.source, self.side)
        pixels = _of_shape(pixels, host.prepared.shape, self.source.path)
        table = pa.table({"pixels": lists(pixels.reshape(len(pixels), -1))})
        letters = pa.table(
            {name: [getattr(one, name) for one in dead] for name in ("file", "row", "reason")}
        )
        return Output((table,), {"images": len(pixels)}, named={"dead_letters": letters})


def read_pixels(source: UnlabelledImages, side: int | None) -> tuple[Pixels, list[DeadImage]]:
    """All images uint8 [N, C, H, W], and those that could not be read.

    Raises:
        InputError: as `check_dead` and `stacked`. BadFileError: an unreadable file.
    """
    files = list_source(source.path)
    alone = [file for file in files if file.name.lower().endswith(IMAGE_SUFFIXES)]
    tables = [read_parquet(file, source.image_column) for file in files if file not in alone]
    records = [*chain(read_images(alone), *tables)]
    images = [one for one in records if isinstance(one, RawImage)]
    dead = [one for one in records if isinstance(one, DeadImage)]
    check_dead(source.path, source.max_bad_rows, len(images), dead)
    return stacked(images, side), dead


def _of_shape(pixels: Pixels, shape: tuple[int, ...], path: str) -> Pixels:
    """The images with the channels of the labelled ones, if they are grey."""
    channels, height, width = shape
    if pixels.shape[2:] != (height, width):
        raise InputError(
            f"`unlabelled`: {path!r} has images of {pixels.shape[2]}x{pixels.shape[3]}, `data` of "
            f"{height}x{width}: set `data.image_size`"
        )
    if pixels.shape[1] > channels:
        raise InputError(
            f"`unlabelled`: {path!r} has images in colour, `data` grey ones: give images of a kind"
        )
    return np.repeat(pixels, channels // pixels.shape[1], 1)
