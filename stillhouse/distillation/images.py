"""Training, validation and test sets of labelled images, read and checked.

Sources are image folders (`<class>/<image>`), Parquet with an image column, and scikit-learn's
digits; local or any fsspec URI. A test part of the source (`train/` and `test/` folders,
`test-*.parquet`) is the test set, else a share is held out. A validation part beside a test part
(`val/`, `valid-*.parquet`) is the validation set, else it is split from the training images class
by class. Everything is chosen on the validation set; the test set is used once.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.distillation.image_files import (
    IMAGE_SUFFIXES,
    DeadImage,
    Label,
    RawImage,
)
from stillhouse.distillation.image_sources import (
    ClassNames,
    ImageData,
    ImageFiles,
    SampleSource,
    check_dead,
)
from stillhouse.errors import InputError
from stillhouse.storage.filesystem import FileInfo

_PARTS = {
    "train": {"train", "training"},
    "test": {"test"},
    "validation": {"val", "valid", "validation"},
}


@dataclass(frozen=True, slots=True)
class ImageSet:
    """N images with their classes; or N vectors or texts.

    Attributes:
        images: uint8 [N, C, H, W]; of vectors float32 [N, D], of texts the tokens int32 [N, T].
        labels: int64 [N], indices into `class_names`.
        class_names: in label order; the training set has an image of every class.
        dead_letters: images that could not be read.
    """

    images: NDArray[Any]
    labels: NDArray[np.int64]
    class_names: ClassNames
    dead_letters: tuple[DeadImage, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W); (D,) of vectors, (T,) of texts."""
        return self.images.shape[1:]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def noun(self) -> str:
        """What one of them is called."""
        return noun_of(self.images)

    def pixels(self) -> NDArray[Any]:
        """float32 in [0, 1]; vectors and tokens as they are."""
        if self.images.dtype != np.uint8:
            return self.images
        return self.images.astype(np.float32) / np.float32(255)

    def take(self, rows: NDArray[np.integer]) -> "ImageSet":
        return replace(self, images=self.images[rows], labels=self.labels[rows])


@dataclass(frozen=True, slots=True)
class ImageSplits:
    """The sets that are trained on, chosen on and, once, measured on."""

    train: ImageSet
    validation: ImageSet
    test: ImageSet


def load_images(data: ImageData, source: SampleSource | None = None) -> ImageSplits:
    """Read and check a source and split it; the same settings give the same splits.

    Args:
        source: how its files are read; default as images.

    Raises:
        InputError: no images, several sizes, one class, a class with too few images, labels out of
            range, more broken images than `max_bad_rows`. BadFileError: an unreadable file.
    """
    if data.dataset == "digits":
        train, test, validation = _digits(), None, None
    else:
        train, test, validation = _from_files(data, source or ImageFiles(data))
    if test is None:
        share = data.test if isinstance(data.test, float) else 0.2
        train, test = split(train, share, seed=data.seed, key="data.test")
        test = replace(test, dead_letters=())  # they are of both, and counted once
    if validation is None:
        train, validation = split(train, data.validation, seed=data.seed + 1, key="data.validation")
        validation = replace(validation, dead_letters=())
    train, validation, test = _of_one_shape(train, validation, test)
    if data.num_images is not None and data.num_images < len(train):
        kept = data.num_images / len(train)
        _, train = split(train, kept, seed=data.seed + 2, key="data.num_images")
    return ImageSplits(train, validation, test)


def split(images: ImageSet, share: float, *, seed: int, key: str) -> tuple[ImageSet, ImageSet]:
    """(rest, part): `share` of every class, at least one image, drawn by the seed, is the part.

    Raises:
        InputError: a class has a single image; the message names the setting `key`.
    """
    rng = np.random.default_rng(seed)
    chosen = np.zeros(len(images), bool)
    for label, name in enumerate(images.class_names):
        rows = np.flatnonzero(images.labels == label)
        if len(rows) < 2:
            raise InputError(
                f"class {name!r} has {len(rows)} {images.noun}, `{key}` needs at least 2 to split"
            )
        count = min(max(round(share * len(rows)), 1), len(rows) - 1)
        chosen[rng.permutation(rows)[:count]] = True
    return images.take(np.flatnonzero(~chosen)), images.take(np.flatnonzero(chosen))


def _of_one_shape(train: ImageSet, validation: ImageSet, test: ImageSet) -> list[ImageSet]:
    """The sets, images all in colour if one is; InputError where sizes differ."""
    for name, other in (("validation", validation), ("test", test)):
        if len(train.shape) == 1 and other.shape != train.shape:
            raise InputError(
                f"training vectors of {train.shape[0]} values, {name} vectors of {other.shape[0]}"
            )
        if other.shape[1:] != train.shape[1:]:
            sizes = ["x".join(map(str, shape[1:])) for shape in (train.shape, other.shape)]
            raise InputError(
                f"training images of {sizes[0]}, {name} images of {sizes[1]}: set `data.image_size`"
            )
    sets = [train, validation, test]
    channels = max(one.shape[0] for one in sets)
    return [replace(one, images=np.repeat(one.images, channels // one.shape[0], 1)) for one in sets]


def _digits() -> ImageSet:
    """8x8 grey images; their 17 levels are scaled to 8 bits."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError(
            "`dataset: digits` needs scikit-learn: install it, or set `path`"
        ) from None
    digits: Any = load_digits()
    pixels = np.rint(digits.images[:, None] * (255 / 16)).astype(np.uint8)
    return image_set(pixels, digits.target)


def _from_files(
    data: ImageData, source: SampleSource
) -> tuple[ImageSet, ImageSet | None, ImageSet | None]:
    """The training set, and the test and validation sets that the source has."""
    assert data.path is not None
    train_files, validation_files = source.list_files(data.path), list[FileInfo]()
    if isinstance(data.test, str):
        test_files = source.list_files(data.test)
    else:
        train_files, test_files, validation_files = _by_part(train_files)
    train = _read(train_files, data, source, data.path)
    test, validation = (
        _read(files, data, source, f"the {part} part of {data.path}", train.class_names)
        if files
        else None
        for part, files in (("test", test_files), ("validation", validation_files))
    )
    return train, test, validation


def _by_part(files: Sequence[FileInfo]) -> tuple[list[FileInfo], list[FileInfo], list[FileInfo]]:
    """Training, test and validation files by name; a validation part alone is the test part."""
    parts: dict[str, list[FileInfo]] = {}
    for file in files:
        parts.setdefault(_part_of(file.name), []).append(file)
    validation, test = parts.get("validation", []), parts.get("test", [])
    train = parts.get("train") or parts.get("", [])
    if not train:
        raise InputError(f"no training files, only a test part: {files[0].uri!r} ...")
    return (train, test, validation) if test else (train, validation, [])


def _part_of(name: str) -> str:
    """ "train", "test", "validation" or "". An image's is its first folder above the class."""
    image = name.lower().endswith(IMAGE_SUFFIXES)
    words = name.lower().split("/")[:-2][:1] if image else re.split(r"[/_.-]", name.lower())
    return next((part for part, names in _PARTS.items() if names & set(words)), "")


def _read(
    files: Sequence[FileInfo],
    data: ImageData,
    source: SampleSource,
    place: str,
    train_classes: ClassNames | None = None,
) -> ImageSet:
    """The samples of the files; `train_classes` are None for the training set itself."""
    names = source.class_names(files)
    images: list[RawImage] = []
    dead: list[DeadImage] = []
    for record in source.read(files):
        dead.append(record) if isinstance(record, DeadImage) else images.append(record)
    check_dead(data.path, data.max_bad_rows, len(images), dead, source.noun)
    return image_set(
        source.stack(images),
        [image.label for image in images],
        class_names=train_classes or names,
        complete=train_classes is None,
        place=place,
        dead_letters=dead,
    )


def image_set(
    images: NDArray[Any],
    labels: Sequence[Label] | NDArray[Any],
    *,
    class_names: Sequence[str] | None = None,
    complete: bool = True,
    place: str = "the arrays",
    dead_letters: Sequence[DeadImage] = (),
) -> ImageSet:
    """Arrays as an `ImageSet`; labels are checked.

    Args:
        images: as `ImageSet.images`.
        labels: [N], names or integers from 0 (indices into `class_names`).
        class_names: fixes the classes and their order.
        complete: whether every class must have an image; not in a test set.
        place: where they come from, for messages.
        dead_letters: stored with the set.

    Raises:
        InputError: labels out of range or of mixed types, a single class, an empty class.
    """
    values, noun = np.asarray(labels).tolist(), noun_of(images)
    names = tuple(class_names) if class_names is not None else _class_names(values, place, noun)
    listed = ", ".join(names) if len(names) <= 6 else f"{names[0]}, {names[1]}, ... {names[-1]}"
    index = {name: i for i, name in enumerate(names)}
    numbers = [label if isinstance(label, int) else index.get(label, -1) for label in values]
    for row, (label, value) in enumerate(zip(numbers, values, strict=True)):
        if not 0 <= label < len(names):
            raise InputError(
                f"{place}: label {value!r} of {noun} {row} is out of range, the classes are "
                f"{listed}"
            )
    if complete and len(names) < 2:
        raise InputError(f"{place}: {len(names)} class ({listed}), at least 2 are needed")
    indices = np.array(numbers, np.int64)
    for label, count in enumerate(np.bincount(indices, minlength=len(names)) if complete else []):
        if not count:
            raise InputError(f"{place}: class {names[label]!r} has no {noun}; labels count from 0")
    return ImageSet(images, indices, names, tuple(dead_letters))


def noun_of(samples: NDArray[Any]) -> str:
    """What a sample of an array is called: image, vector or text."""
    if samples.ndim == 4:
        return "image"
    return "vector" if np.issubdtype(samples.dtype, np.floating) else "text"


def _class_names(labels: Sequence[Any], place: str, noun: str) -> ClassNames:
    """Integers count from 0; names are sorted, numerically if all are numbers."""
    distinct = set(labels)
    if all(isinstance(label, int) for label in distinct):
        if max(distinct, default=0) >= max(len(labels), 1):
            raise InputError(
                f"{place}: label {max(distinct)} is out of range for {len(labels)} {noun}s: labels "
                f"count from 0 and every class has {'an' if noun == 'image' else 'a'} {noun}"
            )
        return tuple(str(label) for label in range(max(distinct, default=-1) + 1))
    if not all(isinstance(label, str) for label in distinct):
        raise InputError(f"{place}: labels are neither all integers nor all names")
    numbers = all(re.fullmatch(r"[0-9]+", label) for label in distinct)
    return tuple(sorted(distinct, key=lambda label: (int(label) if numbers else 0, label)))
