"""Sets of labelled images as Parquet, and the bytes that they cost to store.

A row is an image: `values` (the network's input in float32, or 8-bit codes with a range for each
channel in the schema's metadata), `label`, `label_logits` where labels are soft, and in results a
PNG `image` to look at, which `datasets` decodes.

INFER's sets are factored into real images and compensators, which are added when they are read: a
row for each real image (index by index, each class by class), then one for each compensator
(teacher by teacher). Cells that a row has no value for are null:

| row | `label` | `values` | `compensator` | `label_logits` |
|---|---|---|---|---|
| a real image | its class | 8-bit levels | | of itself, then of its sum with each teacher's u |
| a compensator | | | int8, in 1/127 of the pixel range | |

Bytes are counted uncompressed, in the precision that is stored. Views of a set (crops, flips,
mixtures) are drawn again from their seed and cost nothing; the teachers' answers to them do.
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
"""Files beside the manifest of a result: the preprocessing, and stored labels of views."""
_KEY = b"stillhouse"
LEVELS = 255
UNIT = 127
"""A compensator of this value changes a pixel by its whole range."""
HALF = 2
"""Bytes of a float16 label value."""
_RATE_BYTES = 4
Ranges = tuple[tuple[float, float], ...]
"""(value of level 0, step of a level) of each channel."""


@dataclass(frozen=True, slots=True)
class StoredBytes:
    """Bytes of a set's images (compensators included) and of its labels of every kind."""

    images: int
    labels: int

    @property
    def total(self) -> int:
        return self.images + self.labels


def hard_label_bytes(num_images: int, num_classes: int) -> int:
    """One class index an image: a byte up to 256 classes, else two."""
    return num_images * (1 if num_classes <= 256 else 2)


@dataclass(frozen=True, slots=True)
class CompensatedSet:
    """What INFER stores.

    Attributes:
        real: uint8 [K, num_classes, C, H, W], an image of each class for each index.
        compensators: int8 [M, K, C, H, W] in 1/127 of the pixel range.
    """

    real: Tensor
    compensators: Tensor

    @property
    def num_real(self) -> int:
        return self.real.shape[0] * self.real.shape[1]

    @property
    def num_bytes(self) -> int:
        return self.real.numel() + self.compensators.numel()

    @property
    def labels(self) -> Tensor:
        """Classes int64 [(M + 1) * K * num_classes] of the expanded images."""
        per_class = (1 + len(self.compensators)) * len(self.real)
        return torch.arange(self.real.shape[1], device=self.real.device).repeat(per_class)

    def expand(self) -> Tensor:
        """uint8 [(M + 1) * K * num_classes, C, H, W]: the real images, then the sums by teacher.

        No sum lies midway between two levels (255 u / 127 never does): rounding is unambiguous.
        """
        shifts = self.compensators[:, :, None].float() * (LEVELS / UNIT)
        sums = (self.real.float() + shifts).round().clamp(0, LEVELS).to(torch.uint8)
        return torch.cat([self.real[None], sums]).flatten(0, 2)

    def pictures(self) -> Tensor:
        """The compensators as pictures [M * K, C, H, W] in [0, 1], halved; grey is no change."""
        return self.compensators.flatten(0, 1).float() / (2 * UNIT) + 0.5


@dataclass(frozen=True, slots=True)
class LabelledSet:
    """A set as a network is trained on it; on the CPU.

    Attributes:
        images: preprocessed float32 [N, C, H, W], as rounded by storing.
        labels: classes int64 [N]; of synthetic images the classes that they began as.
        label_logits: soft labels float32 [N, num_classes], or None.
        learning_rate: learned with the images, or None.
        ranges: of 8-bit `values`, or None.
        stored: what the set costs to store.
        factored: what is stored in place of INFER's images, or None.
    """

    images: Tensor
    labels: Tensor
    label_logits: Tensor | None
    learning_rate: float | None
    ranges: Ranges | None
    stored: StoredBytes
    factored: CompensatedSet | None = None

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
    """Images [N, C, H, W] rounded to 256 levels between each channel's extremes, or as they are."""
    images, ranges = images.detach().cpu().float(), None
    if levels:
        low, high = images.amin((0, 2, 3)), images.amax((0, 2, 3))
        steps = ((high - low) / LEVELS).clamp(min=1e-12)
        ranges = tuple(zip(low.tolist(), steps.tolist(), strict=True))
        images = decode(encode(images, ranges), ranges)
    extra = _RATE_BYTES * (learning_rate is not None) + 8 * images.shape[1] * levels
    stored = StoredBytes(
        images.numel() * (1 if levels else 4) + extra, hard_label_bytes(len(images), num_classes)
    )
    return LabelledSet(images, labels.cpu(), None, learning_rate, ranges, stored)


def pixel_set(images: Tensor, labels: Tensor, num_classes: int, ranges: Ranges) -> LabelledSet:
    """Standardised images rounded to pixels of 8 bits (`Standardisation.ranges`)."""
    images = decode(encode(images.detach().cpu().float(), ranges), ranges)
    stored = StoredBytes(images.numel(), hard_label_bytes(len(images), num_classes))
    return LabelledSet(images, labels.cpu(), None, None, ranges, stored)


def expanded_set(factored: CompensatedSet, ranges: Ranges) -> LabelledSet:
    """INFER's expanded images; the sums share the labels of their real images."""
    labels = hard_label_bytes(factored.num_real, factored.real.shape[1])
    stored = StoredBytes(factored.num_bytes, labels)
    images = decode(factored.expand(), ranges)
    return LabelledSet(images, factored.labels, None, None, ranges, stored, factored)


def encode(images: Tensor, ranges: Ranges) -> Tensor:
    """uint8 levels of images [N, C, H, W]."""
    low, step = torch.tensor(ranges)[:, :, None, None].unbind(1)
    return ((images - low) / step).round().clamp(0, LEVELS).to(torch.uint8)


def decode(codes: Tensor, ranges: Ranges) -> Tensor:
    low, step = torch.tensor(ranges)[:, :, None, None].unbind(1)
    return low + codes.float() * step


def set_table(
    small: LabelledSet, pngs: Sequence[bytes] | None = None, class_names: Sequence[str] = ()
) -> pa.Table:
    """The rows of a set; with `pngs` an `image` column and names for `datasets`."""
    factored = small.factored
    columns = _columns(small) if factored is None else _factored_columns(small, factored)
    header: dict[str, Any] = {
        "shape": list(small.images.shape[1:]),
        "learning_rate": small.learning_rate,
        "ranges": small.ranges,
        "stored": [small.stored.images, small.stored.labels],
    }
    if factored is not None:
        header["teachers"] = len(factored.compensators)
    metadata = {_KEY: json.dumps(header).encode()}
    if pngs is not None:
        features = {name: _feature(column.type) for name, column in columns.items()}
        label = {"names": list(class_names), "_type": "ClassLabel"}
        features |= {"image": {"_type": "Image"}, "label": label}
        entries = [{"bytes": png, "path": f"{row:06d}.png"} for row, png in enumerate(pngs)]
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        columns = {"image": pa.array(entries, kind)} | columns
        metadata[b"huggingface"] = json.dumps({"info": {"features": features}}).encode()
    return pa.table(columns).replace_schema_metadata(metadata)


def _columns(small: LabelledSet) -> dict[str, pa.Array]:
    values = small.images if small.ranges is None else encode(small.images, small.ranges)
    columns = {"label": pa.array(small.labels.numpy()), "values": lists(values.flatten(1).numpy())}
    if small.label_logits is not None:
        columns["label_logits"] = lists(small.label_logits.numpy())
    return columns


def _factored_columns(small: LabelledSet, factored: CompensatedSet) -> dict[str, pa.Array]:
    logits, num_real = small.label_logits, factored.num_real
    compensators = factored.compensators.flatten(0, 1).flatten(1)

    def of_real(cells: pa.Array) -> pa.Array:
        return pa.concat_arrays([cells, pa.nulls(len(compensators), cells.type)])

    column = lists(compensators.numpy())
    columns = {
        "label": of_real(pa.array(factored.labels[:num_real].numpy())),
        "values": of_real(lists(factored.real.flatten(0, 1).flatten(1).numpy())),
        "compensator": pa.concat_arrays([pa.nulls(num_real, column.type), column]),
    }
    if logits is not None:
        by_image = logits.view(-1, num_real, logits.shape[1]).transpose(0, 1)
        columns["label_logits"] = of_real(lists(by_image.half().numpy()))
    return columns


def read_set(table: pa.Table, place: str) -> LabelledSet:
    """The set in a table of `set_table`; ArtifactError names the `place` of any other table."""
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
        compensators = torch.from_numpy(flat_values(table, "compensator"))
        compensators = compensators.reshape(header["teachers"], -1, *shape)
        real = values.reshape(compensators.shape[1], -1, *shape)
        factored = CompensatedSet(real, compensators)
        if logits is not None:
            by_image = logits.reshape(factored.num_real, len(compensators) + 1, -1)
            logits = by_image.transpose(0, 1).flatten(0, 1)
        stored = StoredBytes(factored.num_bytes, stored.labels)
        images = decode(factored.expand(), ranges)
        return LabelledSet(images, factored.labels, logits, None, ranges, stored, factored)
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
    """Rows [N, a, b, ...] as nested lists of fixed size."""
    nested = pa.array(np.ascontiguousarray(rows).ravel())
    for length in reversed(rows.shape[1:]):
        nested = pa.FixedSizeListArray.from_arrays(nested, length)
    return nested


def flat_values(table: pa.Table, name: str) -> NDArray[Any]:
    """All values of a column of `lists`, flat; null rows have none."""
    values = table[name].combine_chunks()
    while pa.types.is_fixed_size_list(values.type):
        values = values.flatten()
    return np.array(values)


def _feature(kind: pa.DataType) -> dict[str, Any]:
    """A column's type in the format of `datasets`."""
    if pa.types.is_fixed_size_list(kind):
        return {"feature": _feature(kind.value_type), "length": kind.list_size, "_type": "List"}
    name = {"float": "float32", "halffloat": "float16"}.get(str(kind), str(kind))
    return {"dtype": name, "_type": "Value"}


def png_bytes(pixels: Tensor) -> list[bytes]:
    """PNGs of images [N, C, H, W] in [0, 1] (clipped), C 1 or 3."""
    from PIL import Image

    levels = (pixels * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
    pngs: list[bytes] = []
    for image in levels:
        shown = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
        buffer = io.BytesIO()
        Image.fromarray(shown).save(buffer, "PNG", optimize=True)
        pngs.append(buffer.getvalue())
    return pngs
