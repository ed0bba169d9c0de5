"""Sets of labelled images as Parquet, and what they cost to store.

A row is an image: `values` (what a network sees, float32, or codes of 8 bits with a range for each
channel in the schema's metadata), `label`, `label_logits` where labels are soft, and in results a
PNG `image` to look at, which `datasets` decodes.

INFER's sets hold real images and compensators apart, which are added when they are read: a row for
each real image (index by index, each class by class) and after them one for each compensator
(teacher by teacher). What a row is not is null in it:

| row | `label` | `values` | `compensator` | `label_logits` |
|---|---|---|---|---|
| a real image | its class | 8-bit levels | | of itself, then of itself and each teacher's u |
| a compensator | | | int8, in 1/127 of the pixel range | |

Bytes are counted uncompressed, in the precision that is stored. Views of a set (crops, flips,
mixing) are drawn again from their seed and cost nothing; what a teacher said of them does.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from stillhouse.errors import ArtifactError

PREPROCESSING = "preprocessing.safetensors"
LABELS = "labels.safetensors"
"""Beside the manifest of a result: what turns pixels into images; stored labels of views."""
_KEY = b"stillhouse"
_LEVELS = 255
UNIT = 127
"""A compensator of so much changes a pixel by its whole range."""
HALF = 2
"""Bytes of a float16 label value."""
RATE_BYTES = 4
"""A learned learning rate."""
Ranges = tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class StoredBytes:
    """Bytes of a set's images (compensators included) and of its labels of every kind."""

    images: int
    labels: int

    @property
    def total(self) -> int:
        """Both."""
        return self.images + self.labels


def hard_label_bytes(num_images: int, num_classes: int) -> int:
    """One class index an image: a byte up to 256 classes, else two."""
    return num_images * (1 if num_classes <= 256 else 2)


@dataclass(frozen=True, slots=True)
class CompensatedSet:
    """What INFER stores, in the precision that is stored.

    Attributes:
        real: uint8 [K, num_classes, C, H, W], an image of each class, class by class.
        compensators: int8 [M, K, C, H, W] in 1/127 of the pixel range.
    """

    real: Tensor
    compensators: Tensor

    @property
    def num_real(self) -> int:
        """Real images in all."""
        return self.real.shape[0] * self.real.shape[1]

    @property
    def num_bytes(self) -> int:
        """Of all images: a byte a value."""
        return self.real.numel() + self.compensators.numel()

    @property
    def labels(self) -> Tensor:
        """Classes int64 [(M + 1) * K * num_classes] of the expanded images."""
        per_class = (1 + len(self.compensators)) * len(self.real)
        return torch.arange(self.real.shape[1], device=self.real.device).repeat(per_class)

    def expand(self) -> Tensor:
        """uint8 [(M + 1) * K * num_classes, C, H, W]: the real images, then the sums by teacher.

        No sum lies midway between two levels (255 u / 127 never does): every machine rounds alike.
        """
        shifts = self.compensators[:, :, None].float() * (_LEVELS / UNIT)
        sums = (self.real.float() + shifts).round().clamp(0, _LEVELS).to(torch.uint8)
        return torch.cat([self.real[None], sums]).flatten(0, 2)

    def pictures(self) -> Tensor:
        """The compensators to look at, [M * K, C, H, W] in [0, 1]: grey where they change nothing.

        Half as strong as they are.
        """
        return self.compensators.flatten(0, 1).float() / (2 * UNIT) + 0.5


@dataclass(frozen=True, slots=True)
class LabelledSet:
    """A set as a network is trained on it; all on the CPU.

    Attributes:
        images: preprocessed float32 [N, C, H, W], rounded to what is stored.
        labels: classes int64 [N].
        label_logits: soft labels float32 [N, num_classes], or None.
        learning_rate: learned with the images, or None.
        ranges: per channel (least value, step of a level) where `values` are codes of 8 bits.
        stored: what the set costs to store.
        apart: what is stored of INFER's images; None where the images themselves are.
    """

    images: Tensor
    labels: Tensor
    label_logits: Tensor | None
    learning_rate: float | None
    ranges: Ranges | None
    stored: StoredBytes
    apart: CompensatedSet | None = None

    def with_logits(self, label_logits: Tensor) -> "LabelledSet":
        """The same images with soft labels [N, num_classes], rounded to float16."""
        logits = label_logits.detach().cpu().half().float()
        stored = StoredBytes(self.stored.images, logits.numel() * HALF)
        return replace(self, label_logits=logits, stored=stored)


def rounded_set(
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    learning_rate: float | None = None,
    levels: bool = True,
) -> LabelledSet:
    """Images [N, C, H, W] rounded to 256 levels between each channel's extremes, or as they are.

    `labels` int64 [N] name the classes that the images began as.
    """
    images, ranges = images.detach().cpu().float(), None
    if levels:
        low, high = images.amin((0, 2, 3)), images.amax((0, 2, 3))
        steps = ((high - low) / _LEVELS).clamp(min=1e-12)
        ranges = tuple(zip(low.tolist(), steps.tolist(), strict=True))
        images = decode(encode(images, ranges), ranges)
    extra = RATE_BYTES * (learning_rate is not None) + 8 * images.shape[1] * levels
    stored = StoredBytes(
        images.numel() * (1 if levels else 4) + extra, hard_label_bytes(len(images), num_classes)
    )
    return LabelledSet(images, labels.cpu(), None, learning_rate, ranges, stored)


def pixel_set(
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> LabelledSet:
    """Standardised images whose pixels are 8 bits already: the levels are the pixels' own."""
    ranges = _pixel_ranges(mean, std)
    images = decode(encode(images.detach().cpu().float(), ranges), ranges)
    stored = StoredBytes(images.numel(), hard_label_bytes(len(images), num_classes))
    return LabelledSet(images, labels.cpu(), None, None, ranges, stored)


def expanded_set(apart: CompensatedSet, mean: Sequence[float], std: Sequence[float]) -> LabelledSet:
    """INFER's expanded images and their classes, for the bytes of what is stored of them.

    Labels are the classes of the real images, which the sums share.
    """
    ranges = _pixel_ranges(mean, std)
    stored = StoredBytes(apart.num_bytes, hard_label_bytes(apart.num_real, apart.real.shape[1]))
    images = decode(apart.expand(), ranges)
    return LabelledSet(images, apart.labels, None, None, ranges, stored, apart)


def _pixel_ranges(mean: Sequence[float], std: Sequence[float]) -> Ranges:
    return tuple((-m / s, 1 / (_LEVELS * s)) for m, s in zip(mean, std, strict=True))


def encode(images: Tensor, ranges: Ranges) -> Tensor:
    """uint8 levels of images [N, C, H, W]."""
    low, step = torch.tensor(ranges)[:, :, None, None].unbind(1)
    return ((images - low) / step).round().clamp(0, _LEVELS).to(torch.uint8)


def decode(codes: Tensor, ranges: Ranges) -> Tensor:
    """Images of levels."""
    low, step = torch.tensor(ranges)[:, :, None, None].unbind(1)
    return low + codes.float() * step


def set_table(
    given: LabelledSet, pngs: Sequence[bytes] | None = None, class_names: Sequence[str] = ()
) -> pa.Table:
    """The rows of a set; with `pngs` as `datasets` reads them, with an Image and class names."""
    columns, features = (_columns if given.apart is None else _columns_apart)(given)
    header: dict[str, Any] = {
        "shape": list(given.images.shape[1:]),
        "learning_rate": given.learning_rate,
        "ranges": given.ranges,
        "stored": [given.stored.images, given.stored.labels],
    }
    if given.apart is not None:
        header["teachers"] = len(given.apart.compensators)
    metadata = {_KEY: json.dumps(header).encode()}
    if pngs is not None:
        entries = [{"bytes": png, "path": f"{row:06d}.png"} for row, png in enumerate(pngs)]
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        columns = {"image": pa.array(entries, kind)} | columns
        label = {"names": list(class_names), "_type": "ClassLabel"}
        described = {"image": {"_type": "Image"}, "label": label} | features
        metadata[b"huggingface"] = json.dumps({"info": {"features": described}}).encode()
    return pa.table(columns).replace_schema_metadata(metadata)


_Columns = tuple[dict[str, pa.Array], dict[str, Any]]
"""Columns, and the lists among them as `datasets` describes them."""


def _columns(given: LabelledSet) -> _Columns:
    values = given.images if given.ranges is None else encode(given.images, given.ranges)
    columns = {
        "label": pa.array(given.labels.numpy()),
        "values": lists(values.flatten(1).numpy()),
    }
    dtype = "float32" if given.ranges is None else "uint8"
    features = {"values": _feature(dtype, given.images[0].numel())}
    if given.label_logits is not None:
        columns["label_logits"] = lists(given.label_logits.numpy())
        features["label_logits"] = _feature("float32", given.label_logits.shape[1])
    return columns, features


def _columns_apart(given: LabelledSet) -> _Columns:
    assert given.apart is not None
    apart, logits = given.apart, given.label_logits
    shared = apart.compensators.flatten(0, 1).flatten(1)
    num_real, num_shared, length = apart.num_real, len(shared), shared.shape[1]
    columns = {
        "label": _padded(pa.array(apart.labels[:num_real].numpy()), 0, num_shared),
        "values": _padded(lists(apart.real.flatten(0, 1).flatten(1).numpy()), 0, num_shared),
        "compensator": _padded(lists(shared.numpy()), num_real, 0),
    }
    features = {"values": _feature("uint8", length), "compensator": _feature("int8", length)}
    if logits is not None:
        by_image = logits.view(-1, num_real, logits.shape[1]).transpose(0, 1)
        columns["label_logits"] = _padded(lists(by_image.half().numpy()), 0, num_shared)
        features["label_logits"] = _feature("float16", *by_image.shape[1:])
    return columns, features


def _padded(rows: pa.Array, before: int, after: int) -> pa.Array:
    return pa.concat_arrays([pa.nulls(before, rows.type), rows, pa.nulls(after, rows.type)])


def read_set(table: pa.Table, place: str) -> LabelledSet:
    """The set in a table of `set_table`; ArtifactError where `place` holds another table."""
    metadata = table.schema.metadata or {}
    if _KEY not in metadata:
        raise ArtifactError(f"{place} holds no set of images")
    header = json.loads(metadata[_KEY])
    shape = header["shape"]
    ranges = header["ranges"] and tuple((low, step) for low, step in header["ranges"])
    stored = StoredBytes(*header["stored"])
    logits = None
    if "label_logits" in table.column_names:
        logits = torch.from_numpy(flat_values(table, "label_logits")).float()
    values = torch.from_numpy(flat_values(table, "values"))
    if "teachers" in header:
        shared = torch.from_numpy(flat_values(table, "compensator"))
        shared = shared.reshape(header["teachers"], -1, *shape)
        apart = CompensatedSet(values.reshape(shared.shape[1], -1, *shape), shared)
        if logits is not None:
            by_image = logits.reshape(apart.num_real, len(shared) + 1, -1)
            logits = by_image.transpose(0, 1).flatten(0, 1)
        stored = StoredBytes(apart.num_bytes, stored.labels)
        images = decode(apart.expand(), ranges)
        return LabelledSet(images, apart.labels, logits, None, ranges, stored, apart)
    rows = values.reshape(-1, *shape)
    return LabelledSet(
        rows if ranges is None else decode(rows, ranges),
        torch.from_numpy(table["label"].to_numpy().astype(np.int64)),
        None if logits is None else logits.reshape(len(rows), -1),
        header["learning_rate"],
        ranges,
        stored,
    )


def lists(rows: NDArray[Any]) -> pa.Array:
    """Rows [N, a, b, ...] as lists of fixed sizes, one within the other."""
    found = pa.array(np.ascontiguousarray(rows).ravel())
    for length in reversed(rows.shape[1:]):
        found = pa.FixedSizeListArray.from_arrays(found, length)
    return found


def flat_values(table: pa.Table, name: str) -> NDArray[Any]:
    """All values of a column of `lists`, flat; a row that is null has none."""
    found = table[name].combine_chunks()
    while pa.types.is_fixed_size_list(found.type):
        found = found.flatten()
    return np.array(found)


def _feature(dtype: str, *lengths: int) -> dict[str, Any]:
    """The type of such a column in the words of `datasets`."""
    found: dict[str, Any] = {"dtype": dtype, "_type": "Value"}
    for length in reversed(lengths):
        found = {"feature": found, "length": length, "_type": "List"}
    return found


def png_bytes(pixels: Tensor) -> list[bytes]:
    """PNGs of images [N, C, H, W] with pixels in [0, 1] (clipped), C 1 or 3."""
    from PIL import Image

    levels = (pixels * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
    found: list[bytes] = []
    for image in levels:
        shown = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
        buffer = io.BytesIO()
        Image.fromarray(shown).save(buffer, "PNG", optimize=True)
        found.append(buffer.getvalue())
    return found
