"""Sets of labelled images as Parquet: snapshots of a distillation, controls, and the result.

A row is an image: `values` (what a network sees, float32, or codes of 8 bits with a range for each
channel in the schema's metadata), `label`, `label_logits` where labels are soft, and in results a
PNG `image` to look at, which `datasets` decodes. INFER's rows are those of `compensators`.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from stillhouse.distillation.compensators import (
    CompensatedSet,
    columns_apart,
    features_apart,
    read_apart,
)
from stillhouse.distillation.list_columns import feature, flat_values, lists
from stillhouse.distillation.storage_budget import (
    StoredBytes,
    hard_label_bytes,
    image_bytes,
    soft_label_bytes,
)
from stillhouse.errors import ArtifactError

_KEY = b"stillhouse"
_LEVELS = 255
RATE_BYTES = 4
"""A learned learning rate."""


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
    ranges: tuple[tuple[float, float], ...] | None
    stored: StoredBytes
    apart: CompensatedSet | None = None


def rounded_set(
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    label_logits: Tensor | None = None,
    learning_rate: float | None = None,
    levels: bool = True,
) -> LabelledSet:
    """Images rounded to 256 levels between each channel's extremes (or as they are), and bytes.

    Label logits are rounded to float16. `labels` int64 [N] name the classes the images began as.
    """
    images, ranges = images.detach().cpu().float(), None
    if levels:
        low, high = images.amin((0, 2, 3)), images.amax((0, 2, 3))
        steps = ((high - low) / _LEVELS).clamp(min=1e-12)
        ranges = tuple(zip(low.tolist(), steps.tolist(), strict=True))
        images = decode(encode(images, ranges), ranges)
    count, shape = len(images), (images.shape[1], images.shape[2], images.shape[3])
    logits = None if label_logits is None else label_logits.detach().cpu().half().float()
    label_cost = (
        hard_label_bytes(count, num_classes)
        if logits is None
        else soft_label_bytes(count, num_classes)
    )
    extra = RATE_BYTES * (learning_rate is not None) + 8 * shape[0] * levels
    stored = StoredBytes(image_bytes(count, shape, 1 if levels else 4) + extra, label_cost)
    return LabelledSet(images, labels.cpu(), logits, learning_rate, ranges, stored)


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
    shape = (images.shape[1], images.shape[2], images.shape[3])
    stored = StoredBytes(
        image_bytes(len(images), shape), hard_label_bytes(len(images), num_classes)
    )
    return LabelledSet(images, labels.cpu(), None, None, ranges, stored)


def expanded_set(apart: CompensatedSet, mean: Sequence[float], std: Sequence[float]) -> LabelledSet:
    """INFER's expanded images and their classes, for the bytes of what is stored of them."""
    ranges, stored = _pixel_ranges(mean, std), apart.stored_bytes(None)
    images = decode(apart.expand(), ranges)
    return LabelledSet(images, apart.labels, None, None, ranges, stored, apart)


def _pixel_ranges(mean: Sequence[float], std: Sequence[float]) -> tuple[tuple[float, float], ...]:
    return tuple((-m / s, 1 / (_LEVELS * s)) for m, s in zip(mean, std, strict=True))


def with_logits(given: LabelledSet, label_logits: Tensor) -> LabelledSet:
    """The same images with static soft labels [N, num_classes], rounded to float16."""
    logits = label_logits.detach().cpu().half().float()
    stored = StoredBytes(given.stored.images, soft_label_bytes(*logits.shape))
    return replace(given, label_logits=logits, stored=stored)


def encode(images: Tensor, ranges: Sequence[tuple[float, float]]) -> Tensor:
    """uint8 levels of images [N, C, H, W]."""
    low, step = _columns(ranges)
    return ((images - low) / step).round().clamp(0, _LEVELS).to(torch.uint8)


def decode(codes: Tensor, ranges: Sequence[tuple[float, float]]) -> Tensor:
    """Images of levels."""
    low, step = _columns(ranges)
    return low + codes.float() * step


def _columns(ranges: Sequence[tuple[float, float]]) -> tuple[Tensor, Tensor]:
    table = torch.tensor(ranges, dtype=torch.float32)
    return table[:, 0].view(-1, 1, 1), table[:, 1].view(-1, 1, 1)


def set_table(
    given: LabelledSet, pngs: Sequence[bytes] | None = None, class_names: Sequence[str] = ()
) -> pa.Table:
    """The rows of a set; with `pngs` as `datasets` reads them, with an Image and class names."""
    columns: dict[str, pa.Array] = {}
    if pngs is not None:
        entries = [{"bytes": png, "path": f"{row:06d}.png"} for row, png in enumerate(pngs)]
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        columns["image"] = pa.array(entries, kind)
    columns |= _rows(given)
    metadata = {_KEY: json.dumps(_header(given)).encode()}
    if pngs is not None:
        metadata[b"huggingface"] = json.dumps(
            {"info": {"features": _features(given, class_names)}}
        ).encode()
    return pa.table(columns).replace_schema_metadata(metadata)


def _rows(given: LabelledSet) -> dict[str, pa.Array]:
    if given.apart is not None:
        return columns_apart(given.apart, given.label_logits)
    values = given.images if given.ranges is None else encode(given.images, given.ranges)
    columns = {
        "label": pa.array(given.labels.numpy()),
        "values": lists(values.flatten(1).numpy()),
    }
    if given.label_logits is not None:
        columns["label_logits"] = lists(given.label_logits.numpy())
    return columns


def _header(given: LabelledSet) -> dict[str, Any]:
    header: dict[str, Any] = {
        "shape": list(given.images.shape[1:]),
        "learning_rate": given.learning_rate,
        "ranges": given.ranges,
        "stored": [given.stored.images, given.stored.labels],
    }
    if given.apart is not None:
        header["teachers"] = len(given.apart.compensators)
    return header


def _features(given: LabelledSet, class_names: Sequence[str]) -> dict[str, Any]:
    """The columns as `datasets` describes them."""
    features: dict[str, Any] = {
        "image": {"_type": "Image"},
        "label": {"names": list(class_names), "_type": "ClassLabel"},
    }
    if given.apart is not None:
        return features | features_apart(given.apart, given.label_logits)
    dtype = "float32" if given.ranges is None else "uint8"
    features["values"] = feature(dtype, given.images[0].numel())
    if given.label_logits is not None:
        features["label_logits"] = feature("float32", given.label_logits.shape[1])
    return features


def read_set(table: pa.Table, place: str) -> LabelledSet:
    """The set in a table of `set_table`.

    Raises:
        ArtifactError: not such a table.
    """
    metadata = table.schema.metadata or {}
    if _KEY not in metadata:
        raise ArtifactError(f"{place} holds no set of images")
    header = json.loads(metadata[_KEY])
    ranges = header["ranges"] and tuple((low, step) for low, step in header["ranges"])
    stored = StoredBytes(*header["stored"])
    if "teachers" in header:
        apart, logits = read_apart(table, header["shape"], header["teachers"])
        stored = StoredBytes(apart.stored_bytes().images, stored.labels)
        images = decode(apart.expand(), ranges)
        return LabelledSet(images, apart.labels, logits, None, ranges, stored, apart)
    rows = torch.from_numpy(flat_values(table, "values")).reshape(-1, *header["shape"])
    soft = "label_logits" in table.column_names
    logits = torch.from_numpy(flat_values(table, "label_logits")) if soft else None
    return LabelledSet(
        rows if ranges is None else decode(rows, ranges),
        torch.from_numpy(table["label"].to_numpy().astype(np.int64)),
        None if logits is None else logits.reshape(len(rows), -1),
        header["learning_rate"],
        ranges,
        stored,
    )


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
