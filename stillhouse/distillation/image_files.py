"""Reading labelled images from image files and from Parquet files with encoded images.

Images are uint8 arrays [C, H, W] with 1 or 3 channels. One that cannot be decoded becomes a
`DeadImage` with its place and the reason.
"""

import io
import json
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from stillhouse.errors import BadFileError, InputError, SpecError
from stillhouse.storage.filesystem import (
    FileInfo,
    join,
    list_files,
    list_names,
    open_read,
    protocol_of,
    read_bytes,
)
from stillhouse.storage.parquet import open_parquet

Pixels = NDArray[np.uint8]
Label = int | str

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
SUFFIXES = (*IMAGE_SUFFIXES, ".parquet")
_ARRAYS = (".npz", "-ubyte", "-ubyte.gz")
_NOT_EMBEDDED = "paths are not followed, embed the images in the file"
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, IndexError)


@dataclass(frozen=True, slots=True)
class DeadImage:
    """An image that was left out: file (relative name), row in it, reason."""

    file: str
    row: int
    reason: str


@dataclass(frozen=True, slots=True)
class RawImage:
    """A decoded image, its label as the file spells it, and where it came from.

    Attributes:
        pixels: of an image; else the values of a vector, or the tokens of a text.
    """

    pixels: NDArray[Any]
    label: Label
    file: str
    row: int


Record = RawImage | DeadImage


def list_source(path: str) -> list[FileInfo]:
    """The image and Parquet files of a folder, glob or file.

    Raises:
        InputError: there are none. SpecError: NumPy archives or IDX files in their place.
    """
    try:
        files = list_files([path], SUFFIXES)
    except InputError:
        with suppress(InputError):
            _refuse_arrays(list_files([path], _ARRAYS))
        raise
    _refuse_arrays(files)
    return files


def _refuse_arrays(files: Sequence[FileInfo]) -> None:
    for file in files:
        if file.name.lower().endswith(_ARRAYS):
            raise SpecError(
                f"{file.uri!r}: NumPy archives and IDX files are not read: turn them into Parquet "
                "as docs/distillation.md shows, and give that as `data.path`"
            )


def decode_image(data: bytes) -> NDArray[np.uint8]:
    """An encoded image as uint8 [C, H, W], one channel for grey and three for all others.

    EXIF rotation is applied; transparent pixels are blended with white.

    Raises:
        ValueError: no image, truncated, too large, or more than 8 bits a channel.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as opened:
            if opened.mode.startswith(("I", "F")):
                raise ValueError(f"pixels of mode {opened.mode!r} are not 8 bits a channel")
            upright = ImageOps.exif_transpose(opened)
            grey = upright.mode in ("1", "L", "LA", "La")
            if upright.has_transparency_data:
                white = Image.new("RGBA", upright.size, "white")
                upright = Image.alpha_composite(white, upright.convert("RGBA"))
            array = np.asarray(upright.convert("L" if grey else "RGB"), np.uint8)
    except UnidentifiedImageError as error:  # its message holds a memory address
        raise ValueError("cannot decode the image: no known format") from error
    except (*_BROKEN, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot decode the image: {error}") from error
    return array[None] if grey else np.ascontiguousarray(array.transpose(2, 0, 1))


def read_images(files: Sequence[FileInfo]) -> Iterator[Record]:
    """Decodes image files wherever they lie, without labels (0)."""
    for file in files:
        yield _decoded(read_bytes(file.uri), 0, file.name, 0)


def read_folder(files: Sequence[FileInfo]) -> Iterator[Record]:
    """Decodes image files; the label is the name of an image's folder.

    Raises:
        InputError: an image outside a folder, two folders of one name, a folder without images.
    """
    folders = {file.uri.rpartition("/")[0]: file for file in files}
    by_class: dict[str, str] = {}
    for folder, file in folders.items():
        if "/" not in file.name:
            raise InputError(
                f"{file.uri!r} lies in no class folder: an image folder is `<class>/<image>`"
            )
        other = by_class.setdefault(folder.rpartition("/")[2], folder)
        if other != folder:
            raise InputError(
                f"two folders are the class of one name: {other!r} and {folder!r}: rename one, "
                "put their images together, or name one branch in `data.path`"
            )
    for parent in sorted({folder.rpartition("/")[0] for folder in folders}):
        _refuse_empty_classes(parent, [file.uri for file in files])
    for file in files:
        yield _decoded(read_bytes(file.uri), file.name.split("/")[-2], file.name, 0)


def _refuse_empty_classes(parent: str, images: Sequence[str]) -> None:
    """Every folder beside those of classes must hold an image, or its class would vanish."""
    filled = {
        uri[len(parent) + 1 :].split("/")[0] for uri in images if uri.startswith(f"{parent}/")
    }
    for name in list_names(parent):
        folder = join(parent, name)
        is_local = protocol_of(folder) == "file"
        if name in filled or name.startswith((".", "_")):
            continue
        if os.path.isdir(folder) if is_local else list_names(folder):
            raise InputError(
                f"the folder {folder!r} beside those of classes has no image: remove it, or add "
                f"images (one of {', '.join(IMAGE_SUFFIXES)})"
            )


def read_parquet(
    file: FileInfo, image_column: str, label_column: str | None = None
) -> Iterator[Record]:
    """Decodes the rows of a Parquet file; an image is `struct<bytes, path>` or plain bytes.

    Without a column of labels they are 0.

    Raises:
        InputError: a column is missing or holds no encoded images. BadFileError: not Parquet.
    """
    row = 0
    try:
        with open_read(file.uri) as stream:
            parquet = open_parquet(stream)
            _check_columns(file.uri, parquet.schema_arrow, image_column, label_column)
            columns = [image_column] + ([label_column] if label_column else [])
            for batch in parquet.iter_batches(256, columns=columns):
                images = batch.column(image_column).to_pylist()
                labels = (
                    batch.column(label_column).to_pylist() if label_column else [0] * len(batch)
                )
                for image, label in zip(images, labels, strict=True):
                    yield _parquet_record(image, label, file.name, row)
                    row += 1
    except (pa.ArrowInvalid, OSError) as error:
        raise BadFileError(f"cannot read {file.uri!r} as Parquet: {error}") from error


def class_label_names(file: FileInfo, column: str) -> tuple[str, ...] | None:
    """The names of a `ClassLabel` column, which `datasets` writes into the Parquet schema."""
    try:
        with open_read(file.uri) as stream:
            metadata = pq.read_schema(stream).metadata or {}
    except (pa.ArrowInvalid, OSError) as error:
        raise BadFileError(f"cannot read {file.uri!r} as Parquet: {error}") from error
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    names = features.get(column, {}).get("names")
    return tuple(names) if names else None


def resize(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """[C, H, W] resized to (height, width), bicubic with antialiasing."""
    from PIL import Image

    if pixels.shape[1:] == size:
        return pixels
    height, width = size
    planes = [
        np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC))
        for plane in pixels
    ]
    return np.stack(planes)


def _check_columns(
    uri: str, schema: pa.Schema, image_column: str, label_column: str | None
) -> None:
    section = "unlabelled" if label_column is None else "data"
    for key, column in (("image_column", image_column), ("label_column", label_column)):
        if column is not None and column not in schema.names:
            raise InputError(
                f"{uri!r} has no column {column!r}: set `{section}.{key}` to one of "
                f"{', '.join(schema.names)}"
            )
    kind = schema.field(image_column).type
    in_struct = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    inner = kind.field("bytes").type if in_struct else kind
    if inner in (pa.string(), pa.large_string()):
        raise InputError(f"column {image_column!r} of {uri!r} holds text: {_NOT_EMBEDDED}")
    if inner not in (pa.binary(), pa.large_binary(), pa.null()):
        raise InputError(f"column {image_column!r} of {uri!r} holds {kind}, not encoded images")


def _parquet_record(image: Any, label: Any, file: str, row: int) -> Record:
    data = image["bytes"] if isinstance(image, dict) else image
    if data is None:
        path = image.get("path") if isinstance(image, dict) else None
        hint = f", only the path {path!r}: {_NOT_EMBEDDED}" if path else ""
        return DeadImage(file, row, f"no image bytes in the row{hint}")
    return _decoded(data, label, file, row)


def _decoded(data: bytes, label: Any, file: str, row: int) -> Record:
    try:
        checked = check_label(label)
        return RawImage(decode_image(data), checked, file, row)
    except ValueError as error:
        return DeadImage(file, row, str(error))


def check_label(label: Any) -> Label:
    """The label of a row; ValueError where it is neither a number nor a name."""
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise ValueError(f"label {label!r} is neither a number nor a name")
    return label
