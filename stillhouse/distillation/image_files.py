"""Raw images and labels out of files: encoded images, Parquet, IDX and NumPy archives.

What an image may look like is judged in `images`; here a file is read, and an image that cannot be
decoded becomes a `DeadImage` with its place and reason. Images are arrays [C, H, W] with 1 or 3
channels, uint8, or float32 where a NumPy archive holds floats.
"""

import gzip
import io
import json
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.errors import BadFileError, InputError
from stillhouse.storage.filesystem import (
    FileInfo,
    join,
    list_names,
    open_read,
    protocol_of,
    read_bytes,
)
from stillhouse.storage.parquet import open_parquet

Pixels = NDArray[np.uint8 | np.float32]
Label = int | str

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
IDX_IMAGES = re.compile(r"images[-.]idx\d-ubyte(\.gz)?$")
SUFFIXES = (*IMAGE_SUFFIXES, ".parquet", "-ubyte", "-ubyte.gz", ".npz")
_GZIP = b"\x1f\x8b"
_NOT_EMBEDDED = "paths are not followed, embed the images in the file"
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, IndexError)


@dataclass(frozen=True, slots=True)
class DeadImage:
    """One image that was left out: file (relative name), row in it, reason."""

    file: str
    row: int
    reason: str


@dataclass(frozen=True, slots=True)
class RawImage:
    """One decoded image with its label as the file spells it, and where it came from."""

    pixels: Pixels
    label: Label
    file: str
    row: int


Record = RawImage | DeadImage


def decode_image(data: bytes) -> NDArray[np.uint8]:
    """An encoded image as uint8 [C, H, W]: one channel for grey, three for everything else.

    Turned upright where its EXIF data say so; what is transparent shows a white background.

    Raises:
        ValueError: not an image, truncated, too large, or more than 8 bits a channel.
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
    except UnidentifiedImageError as error:  # its own words hold an address of memory
        raise ValueError("cannot decode the image: no known format") from error
    except (*_BROKEN, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot decode the image: {error}") from error
    return array[None] if grey else np.ascontiguousarray(array.transpose(2, 0, 1))


def read_folder(files: Sequence[FileInfo]) -> Iterator[Record]:
    """Image files, one each; the label is the name of the folder that an image lies in.

    Raises:
        InputError: an image in no folder, a class in two places, a folder without images.
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
        _check_folders(parent, [file.uri for file in files])
    for file in files:
        yield _decoded(read_bytes(file.uri), file.name.split("/")[-2], file.name, 0)


def _check_folders(parent: str, images: Sequence[str]) -> None:
    """No folder beside those of classes is without images: its class would just vanish."""
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


def read_parquet(file: FileInfo, image_column: str, label_column: str) -> Iterator[Record]:
    """Rows of a Parquet file as `datasets` writes them: encoded images, labels of any kind.

    An image is `struct<bytes, path>` or plain bytes.

    Raises:
        InputError: a column is missing or holds no encoded images. BadFileError: not Parquet.
    """
    import pyarrow as pa

    row = 0
    try:
        with open_read(file.uri) as stream:
            parquet = open_parquet(stream)
            _check_columns(file.uri, parquet.schema_arrow, image_column, label_column)
            for batch in parquet.iter_batches(256, columns=[image_column, label_column]):
                images = batch.column(image_column).to_pylist()
                labels = batch.column(label_column).to_pylist()
                for image, label in zip(images, labels, strict=True):
                    yield _parquet_record(image, label, file.name, row)
                    row += 1
    except (pa.ArrowInvalid, OSError) as error:
        raise BadFileError(f"cannot read {file.uri!r} as Parquet: {error}") from error


def class_label_names(file: FileInfo, column: str) -> tuple[str, ...] | None:
    """The names of a `ClassLabel` column, which `datasets` writes into a Parquet schema, if any.

    Raises:
        BadFileError: not Parquet.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open_read(file.uri) as stream:
            metadata = pq.read_schema(stream).metadata or {}
    except (pa.ArrowInvalid, OSError) as error:
        raise BadFileError(f"cannot read {file.uri!r} as Parquet: {error}") from error
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    names = features.get(column, {}).get("names")
    return tuple(names) if names else None


def read_idx_pair(images: FileInfo, labels: FileInfo) -> tuple[NDArray[np.uint8], list[int]]:
    """An IDX file of images [N, H, W] and its file of labels [N].

    Raises:
        BadFileError: one is broken or they do not fit together.
    """
    pixels, values = read_idx(images.uri), read_idx(labels.uri)
    if values.ndim != 1 or len(values) != len(pixels):
        raise BadFileError(
            f"{labels.uri!r} holds labels of shape {list(values.shape)} for the {len(pixels)} "
            f"images of {images.uri!r}"
        )
    return pixels, values.tolist()


def read_idx(uri: str) -> NDArray[np.uint8]:
    """An array of unsigned bytes in the IDX format, gzipped or not.

    Layout: two zero bytes, the type (8: unsigned byte), the number of dimensions, each size as a
    big-endian uint32, the values in row-major order.

    Raises:
        BadFileError: truncated, of another type, or not IDX.
    """
    data = read_bytes(uri)
    try:
        data = gzip.decompress(data) if data[:2] == _GZIP else data
    except (OSError, EOFError, zlib.error) as error:
        raise BadFileError(f"cannot unpack {uri!r}: {error}") from error
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise BadFileError(f"{uri!r} is no IDX file of unsigned bytes: it begins {data[:4]!r}")
    start = 4 + 4 * data[3]
    if len(data) < start:
        raise BadFileError(f"{uri!r} is truncated: its header needs {start} bytes, {len(data)} are")
    shape = struct.unpack(f">{data[3]}I", data[4:start])
    if len(data) - start != np.prod(shape, dtype=np.int64):
        raise BadFileError(
            f"{uri!r} is truncated or too long: shape {list(shape)}, {len(data) - start} bytes"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def read_npz(uri: str) -> dict[str, NDArray[Any]]:
    """All arrays of a NumPy archive, by name; pickled objects are refused.

    Raises:
        BadFileError: not an archive of plain arrays.
    """
    try:
        with open_read(uri) as stream, np.load(stream, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (*_BROKEN, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise BadFileError(f"cannot read {uri!r} as a NumPy archive: {error}") from error


def as_channels_first(images: NDArray[Any], place: str) -> NDArray[Any]:
    """[N, H, W], [N, H, W, C] or [N, C, H, W] as [N, C, H, W], C being 1 or 3.

    Raises:
        InputError: another shape; `place` says where.
    """
    if images.ndim == 3:
        return images[:, None]
    if images.ndim == 4 and images.shape[1] in (1, 3):
        return images
    if images.ndim == 4 and images.shape[3] in (1, 3):
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    raise InputError(
        f"{place} holds an array of shape {list(images.shape)}: images are [N, H, W], "
        "[N, H, W, C] or [N, C, H, W] with 1 or 3 channels"
    )


def resize(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """[C, H, W] at another (height, width), bicubic with antialiasing; the same array if equal."""
    from PIL import Image

    if pixels.shape[1:] == size:
        return pixels
    height, width = size
    planes = [
        np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC))
        for plane in pixels
    ]
    return np.stack(planes) if pixels.dtype == np.uint8 else np.clip(np.stack(planes), 0, 1)


def _check_columns(uri: str, schema: Any, image_column: str, label_column: str) -> None:
    import pyarrow as pa

    for key, column in (("image_column", image_column), ("label_column", label_column)):
        if column not in schema.names:
            raise InputError(
                f"{uri!r} has no column {column!r}: set `data.{key}` to one of "
                f"{', '.join(schema.names)}"
            )
    kind = schema.field(image_column).type
    inner = (
        kind.field("bytes").type if pa.types.is_struct(kind) and "bytes" in _fields(kind) else kind
    )
    if pa.types.is_string(inner) or pa.types.is_large_string(inner):
        raise InputError(f"column {image_column!r} of {uri!r} holds text: {_NOT_EMBEDDED}")
    if not any(
        check(inner) for check in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_null)
    ):
        raise InputError(f"column {image_column!r} of {uri!r} holds {kind}, not encoded images")


def _fields(kind: Any) -> Iterable[str]:
    return (kind.field(i).name for i in range(kind.num_fields))


def _parquet_record(image: Any, label: Any, file: str, row: int) -> Record:
    data = image["bytes"] if isinstance(image, dict) else image
    if data is None:
        path = image.get("path") if isinstance(image, dict) else None
        hint = f", only the path {path!r}: {_NOT_EMBEDDED}" if path else ""
        return DeadImage(file, row, f"no image bytes in the row{hint}")
    return _decoded(data, label, file, row)


def _decoded(data: bytes, label: Any, file: str, row: int) -> Record:
    if isinstance(label, bool) or not isinstance(label, int | str):
        return DeadImage(file, row, f"label {label!r} is neither a number nor a name")
    try:
        return RawImage(decode_image(data), label, file, row)
    except ValueError as error:
        return DeadImage(file, row, str(error))
