"""Data in: a training, a validation and a test set of labelled images, checked before any work.

Image folders (`<class>/<image>`), Parquet with an image column, and scikit-learn's digits; local
or any fsspec URI. Where the source has a test part (`train/` and `test/` folders,
`test-*.parquet`) it is the test set, else a share is held out. A validation part beside a test
part (`val/`, `valid-*.parquet`) is the validation set, else it is split from the training data,
class by class; everything is chosen on it, and the test set is touched once.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from stillhouse.distillation.image_files import (
    IMAGE_SUFFIXES,
    SUFFIXES,
    DeadImage,
    Label,
    Pixels,
    RawImage,
    Record,
    class_label_names,
    list_source,
    read_folder,
    read_parquet,
    resize,
)
from stillhouse.distillation.images import ImageSet, image_set, split
from stillhouse.errors import InputError
from stillhouse.spec import Settings
from stillhouse.storage.filesystem import FileInfo

_PARTS = {
    "train": {"train", "training"},
    "test": {"test"},
    "validation": {"val", "valid", "validation"},
}
_Share = Annotated[float, Field(gt=0.0, lt=1.0)]


class ImageData(Settings):
    """Labelled images: files, or a data set that ships with a library."""

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

    @model_validator(mode="after")
    def _one_of(self) -> "ImageData":
        if (self.path is None) == (self.dataset is None):
            raise ValueError("give either `path` or `dataset`")
        return self


@dataclass(frozen=True, slots=True)
class ImageSplits:
    """What is trained on, what is chosen on, and what is measured once."""

    train: ImageSet
    validation: ImageSet
    test: ImageSet


def load_images(data: ImageData) -> ImageSplits:
    """Read and check a source and split it; the same settings give the same splits.

    Raises:
        InputError: no images, several sizes, one class, a class with too few images, labels out of
            range, more broken images than `max_bad_rows`. BadFileError: an unreadable file.
    """
    if data.dataset == "digits":
        train, test, validation = _digits(), None, None
    else:
        train, test, validation = _from_files(data)
    if test is None:
        share = data.test if isinstance(data.test, float) else 0.2
        train, test = split(train, share, seed=data.seed, key="data.test")
        test = replace(test, dead_letters=())  # they are of both, and counted once
    if validation is None:
        train, validation = split(train, data.validation, seed=data.seed + 1, key="data.validation")
        validation = replace(validation, dead_letters=())
    train, validation, test = _alike(train, validation, test)
    if data.num_images is not None and data.num_images < len(train):
        kept = data.num_images / len(train)
        _, train = split(train, kept, seed=data.seed + 2, key="data.num_images")
    return ImageSplits(train, validation, test)


def _alike(
    train: ImageSet, validation: ImageSet, test: ImageSet
) -> tuple[ImageSet, ImageSet, ImageSet]:
    """All in colour where one is.

    Raises:
        InputError: their images have different sizes.
    """
    channels = max(train.shape[0], validation.shape[0], test.shape[0])
    for name, other in (("validation", validation), ("test", test)):
        if other.shape[1:] != train.shape[1:]:
            sizes = [f"{height}x{width}" for _, height, width in (train.shape, other.shape)]
            raise InputError(
                f"training images of {sizes[0]}, {name} images of {sizes[1]}: set `data.image_size`"
            )
    return _in_colour(train, channels), _in_colour(validation, channels), _in_colour(test, channels)


def _in_colour(images: ImageSet, channels: int) -> ImageSet:
    if images.shape[0] == channels:
        return images
    return replace(images, images=np.repeat(images.images, channels, 1))


def _digits() -> ImageSet:
    """Grey 8x8 images of 17 levels, as 8 bits."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError("`dataset: digits` needs scikit-learn: install it, or set `path`") from (
            error
        )
    digits: Any = load_digits()
    pixels = np.rint(digits.images[:, None] * (255 / 16)).astype(np.uint8)
    return image_set(pixels, digits.target)


def _from_files(data: ImageData) -> tuple[ImageSet, ImageSet | None, ImageSet | None]:
    """The training set; a test set and a validation set where the source has them."""
    assert data.path is not None
    files, chosen_on = list_source(data.path), list[FileInfo]()
    if isinstance(data.test, str):
        train_files, test_files = files, list_source(data.test)
    else:
        train_files, test_files, chosen_on = _parts(files)
    train = _as_set(_read(train_files, data), data.path, None)
    test = validation = None
    if chosen_on:
        held = _read(chosen_on, data)
        validation = _as_set(held, f"the validation part of {data.path}", train.class_names)
    if test_files:
        held = _read(test_files, data)
        test = _as_set(held, f"the test part of {data.path}", train.class_names)
    return train, test, validation


_Files = list[FileInfo]


def _parts(files: Sequence[FileInfo]) -> tuple[_Files, _Files, _Files]:
    """Training, test and validation files by their names.

    A validation part stands in for a missing test.
    """
    parts: dict[str, list[FileInfo]] = {}
    for file in files:
        parts.setdefault(_part(file.name), []).append(file)
    validation = parts.get("validation", [])
    test = parts.get("test", [])
    train = parts.get("train") or parts.get("", [])
    if not train:
        raise InputError(f"no training files, only a test part: {files[0].uri!r} ...")
    return (train, test, validation) if test else (train, validation, [])


def _part(name: str) -> str:
    """ "train", "test", "validation" or "": of an image the first folder, if a class is in it."""
    image = name.lower().endswith(IMAGE_SUFFIXES)
    words = name.lower().split("/")[:-2][:1] if image else re.split(r"[/_.-]", name.lower())
    return next((part for part, names in _PARTS.items() if names & set(words)), "")


def _kind(files: Sequence[FileInfo]) -> str:
    """ "image" or "parquet".

    Raises:
        InputError: several kinds in one place.
    """
    kinds = {
        "image" if suffix in IMAGE_SUFFIXES else "parquet": file.uri
        for file in files
        for suffix in SUFFIXES
        if file.name.lower().endswith(suffix)
    }
    if len(kinds) != 1:
        raise InputError(
            f"one kind of files is needed, found {' and '.join(map(repr, kinds.values()))}: "
            "name one in `data.path`"
        )
    return next(iter(kinds))


@dataclass(frozen=True, slots=True)
class _Raw:
    images: Pixels
    labels: list[Label]
    dead_letters: list[DeadImage]
    class_names: tuple[str, ...] | None = None


def _read(files: Sequence[FileInfo], data: ImageData) -> _Raw:
    """What the files hold."""
    if _kind(files) == "image":
        return _collect(read_folder(files), data, None)
    columns = data.image_column, data.label_column
    rows = chain.from_iterable(read_parquet(file, *columns) for file in files)
    return _collect(rows, data, _parquet_names(files, data.label_column))


def _parquet_names(files: Sequence[FileInfo], column: str) -> tuple[str, ...] | None:
    found = {class_label_names(file, column): file.uri for file in files}
    if len(found) > 1:
        raise InputError(
            f"the classes of column {column!r} differ between {' and '.join(found.values())}"
        )
    return next(iter(found))


def _collect(
    records: Iterable[Record], data: ImageData, class_names: tuple[str, ...] | None
) -> _Raw:
    """Decoded images of one size; all become colour where one is."""
    images: list[RawImage] = []
    dead: list[DeadImage] = []
    for record in records:
        if isinstance(record, DeadImage):
            dead.append(record)
        else:
            images.append(record)
    _check_dead(len(images), dead, data)
    channels = max(len(image.pixels) for image in images)
    pixels = [np.broadcast_to(i.pixels, (channels, *i.pixels.shape[1:])) for i in images]
    if data.image_size:
        pixels = [resize(array, (data.image_size, data.image_size)) for array in pixels]
    _require_one_size([(p.shape, i.file) for p, i in zip(pixels, images, strict=True)])
    return _Raw(np.stack(pixels), [image.label for image in images], dead, class_names)


def _check_dead(num_usable: int, dead: Sequence[DeadImage], data: ImageData) -> None:
    limit = data.max_bad_rows
    allowed = limit * (num_usable + len(dead)) if limit < 1 else limit
    first = "; ".join(f"{d.file} row {d.row}: {d.reason}" for d in dead[:3])
    if not num_usable:
        raise InputError(f"{data.path!r} holds no usable image. {first}")
    if len(dead) > allowed:
        raise InputError(
            f"{len(dead)} of {num_usable + len(dead)} images of {data.path!r} cannot be used, "
            f"`max_bad_rows` allows {allowed:g}. First ones: {first}"
        )


def _require_one_size(found: Sequence[tuple[tuple[int, ...], str]]) -> None:
    counts = Counter(shape[-2:] for shape, _ in found)
    if len(counts) > 1:
        first = {shape[-2:]: place for shape, place in reversed(found)}
        sizes = ", ".join(f"{h}x{w} ({n}, first {first[h, w]})" for (h, w), n in counts.items())
        raise InputError(f"images of several sizes: {sizes}. Set `data.image_size`")
    (height, width), place = next(iter(counts)), found[0][1]
    if height != width:
        raise InputError(
            f"images of {height}x{width} ({place}) are not square: set `data.image_size`"
        )


def _as_set(raw: _Raw, place: str, of_training: tuple[str, ...] | None) -> ImageSet:
    return image_set(
        raw.images,
        raw.labels,
        class_names=of_training or raw.class_names,
        complete=of_training is None,
        place=place,
        dead_letters=raw.dead_letters,
    )
