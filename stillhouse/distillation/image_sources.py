"""Where labelled images come from, and how their files become one array."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from stillhouse.distillation.image_files import (
    IMAGE_SUFFIXES,
    DeadImage,
    Pixels,
    RawImage,
    Record,
    class_label_names,
    list_source,
    read_folder,
    read_parquet,
    resize,
)
from stillhouse.errors import InputError
from stillhouse.settings import allowed_rows
from stillhouse.spec import Settings
from stillhouse.storage.filesystem import FileInfo

_Share = Annotated[float, Field(gt=0.0, lt=1.0)]
ClassNames = tuple[str, ...]


class ImageData(Settings):
    """Labelled images: files, or a data set that a library ships."""

    path: str | None = Field(default=None, description="an image folder or Parquet; any fsspec URI")
    dataset: Literal["digits"] | None = Field(
        default=None, description="digits: scikit-learn's 1,797 images of 8x8, no files needed"
    )
    test: str | _Share = Field(
        default=0.2,
        description="files of the test set; or the share held out where `path` has no test part",
    )
    validation: _Share = Field(
        default=0.1,
        description="share of the training images that everything is chosen on, where `path` has "
        "no validation part beside its test part",
    )
    image_column: str = Field(default="image", description="Parquet: the encoded images")
    label_column: str = Field(default="label", description="Parquet: the class, number or name")
    image_size: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="height and width that every image is resized to"
    )
    max_bad_rows: Annotated[float, Field(ge=0)] = Field(
        default=0.01,
        description="broken images allowed: a share below 1, a count from 1; more stops the run",
    )
    num_images: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="train on this many images, drawn by class; default all"
    )
    seed: int = Field(default=0, description="of the splits and of `num_images`")

    def identity(self) -> dict[str, Any]:
        """The settings that change what is read of the same files."""
        return self.model_dump(mode="json", exclude={"path"})

    @model_validator(mode="after")
    def _one_of(self) -> "ImageData":
        if (self.path is None) == (self.dataset is None):
            raise ValueError("give either `path` or `dataset`")
        return self


class SampleSource(Protocol):
    """How the files of a data set become arrays: images here; elsewhere vectors and texts."""

    @property
    def noun(self) -> str:
        """What a sample is called, in the plural."""
        ...

    def list_files(self, path: str) -> list[FileInfo]:
        """The files of a folder, glob or file; InputError where there are none."""
        ...

    def read(self, files: Sequence[FileInfo]) -> Iterable[Record]:
        """Their samples, in order."""
        ...

    def class_names(self, files: Sequence[FileInfo]) -> ClassNames | None:
        """The classes that the files themselves name, in order."""
        ...

    def stack(self, samples: Sequence[RawImage]) -> NDArray[Any]:
        """All samples as one array; InputError where their sizes differ."""
        ...


@dataclass(frozen=True, slots=True)
class ImageFiles:
    """Image folders, and Parquet with encoded images."""

    data: ImageData

    @property
    def noun(self) -> str:
        return "images"

    def list_files(self, path: str) -> list[FileInfo]:
        return list_source(path)

    def read(self, files: Sequence[FileInfo]) -> Iterable[Record]:
        if self._in_folders(files):
            return read_folder(files)
        columns = self.data.image_column, self.data.label_column
        return chain.from_iterable(read_parquet(file, *columns) for file in files)

    def class_names(self, files: Sequence[FileInfo]) -> ClassNames | None:
        return None if self._in_folders(files) else named_classes(files, self.data.label_column)

    def stack(self, samples: Sequence[RawImage]) -> Pixels:
        return stacked(samples, self.data.image_size)

    def _in_folders(self, files: Sequence[FileInfo]) -> bool:
        kinds = {file.name.lower().endswith(IMAGE_SUFFIXES): file.uri for file in files}
        if len(kinds) > 1:
            raise InputError(
                f"one kind of files is needed, found {' and '.join(map(repr, kinds.values()))}: "
                "name one in `data.path`"
            )
        return True in kinds


def named_classes(files: Sequence[FileInfo], column: str) -> ClassNames | None:
    """The names of a `ClassLabel` column of Parquet files; InputError where files differ."""
    by_names = {class_label_names(file, column): file.uri for file in files}
    if len(by_names) > 1:
        raise InputError(
            f"the classes of column {column!r} differ between {' and '.join(by_names.values())}"
        )
    return next(iter(by_names))


def check_dead(
    path: str | None,
    limit: float,
    num_usable: int,
    dead: Sequence[DeadImage],
    noun: str = "images",
) -> None:
    """Refuse a source with more broken samples than `limit` (`max_bad_rows`), or no other ones.

    Raises:
        InputError: naming the first ones.
    """
    count = num_usable + len(dead)
    allowed = allowed_rows(limit, count)
    first = "; ".join(f"{d.file} row {d.row}: {d.reason}" for d in dead[:3])
    if not num_usable:
        raise InputError(f"{path!r} holds no usable {noun[:-1]}. {first}")
    if len(dead) > allowed:
        raise InputError(
            f"{len(dead)} of {count} {noun} of {path!r} cannot be used, "
            f"`max_bad_rows` allows {allowed:g}. First ones: {first}"
        )


def stacked(images: Sequence[RawImage], side: int | None) -> Pixels:
    """Square images of one size, resized to `side`, all in colour if one is.

    Raises:
        InputError: several sizes, or images that are not square.
    """
    channels = max(len(image.pixels) for image in images)
    pixels = [np.broadcast_to(i.pixels, (channels, *i.pixels.shape[1:])) for i in images]
    if side:
        pixels = [resize(array, (side, side)) for array in pixels]
    counts = Counter(array.shape[1:] for array in pixels)
    first = {a.shape[1:]: i.file for a, i in zip(reversed(pixels), reversed(images), strict=True)}
    if len(counts) > 1:
        sizes = ", ".join(f"{h}x{w} ({n}, first {first[h, w]})" for (h, w), n in counts.items())
        raise InputError(f"images of several sizes: {sizes}. Set `data.image_size`")
    ((height, width),) = counts
    if height != width:
        raise InputError(
            f"images of {height}x{width} ({first[height, width]}) are not square: set "
            "`data.image_size`"
        )
    return np.stack(pixels)
