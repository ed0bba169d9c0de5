"""INFER's images as they are stored: real ones and compensators apart, added when they are read.

A table has a row for each real image (index by index, each class by class) and after them one for
each compensator (teacher by teacher). What a row is not is null in it:

| row | `label` | `values` | `compensator` | `label_logits` |
|---|---|---|---|---|
| a real image | its class | 8-bit levels | | of itself, then of itself and each teacher's u |
| a compensator | | | int8, in 1/127 of the pixel range | |
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from stillhouse.distillation.list_columns import feature, flat_values, lists
from stillhouse.distillation.storage_budget import (
    HALF,
    StoredBytes,
    hard_label_bytes,
    soft_label_bytes,
)

UNIT = 127
"""A compensator of so much changes a pixel by its whole range."""
_LEVELS = 255


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

    def stored_bytes(self, label_value_bytes: int | None = HALF) -> StoredBytes:
        """A byte a value of an image, and a static label for each expanded one.

        Without `label_value_bytes` labels are the classes of the real images, which the sums share.
        """
        num_classes = self.real.shape[1]
        images = self.real.numel() + self.compensators.numel()
        if label_value_bytes is None:
            return StoredBytes(images, hard_label_bytes(self.num_real, num_classes))
        labels = soft_label_bytes(len(self.labels), num_classes, label_value_bytes)
        return StoredBytes(images, labels)

    def pictures(self) -> Tensor:
        """The compensators to look at, [M * K, C, H, W] in [0, 1]: grey where they change nothing.

        Half as strong as they are.
        """
        return self.compensators.flatten(0, 1).float() / (2 * UNIT) + 0.5


def columns_apart(apart: CompensatedSet, label_logits: Tensor | None) -> dict[str, pa.Array]:
    """The columns of the module's table; `label_logits` [N, num_classes] of all expanded images."""
    num_real, num_more = apart.num_real, len(apart.compensators.flatten(0, 1))
    labels = pa.array(apart.labels[:num_real].numpy())
    compensators = lists(apart.compensators.flatten(0, 1).flatten(1).numpy())
    columns = {
        "label": _padded(labels, 0, num_more),
        "values": _padded(lists(apart.real.flatten(0, 1).flatten(1).numpy()), 0, num_more),
        "compensator": _padded(compensators, num_real, 0),
    }
    if label_logits is not None:
        by_image = label_logits.view(-1, num_real, label_logits.shape[1]).transpose(0, 1)
        columns["label_logits"] = _padded(lists(by_image.half().numpy()), 0, num_more)
    return columns


def read_apart(
    table: pa.Table, shape: Sequence[int], num_teachers: int
) -> tuple[CompensatedSet, Tensor | None]:
    """The set in a table of `columns_apart`, and the logits float32 of all expanded images."""
    compensators = torch.from_numpy(flat_values(table, "compensator"))
    compensators = compensators.reshape(num_teachers, -1, *shape)
    real = torch.from_numpy(flat_values(table, "values"))
    apart = CompensatedSet(real.reshape(compensators.shape[1], -1, *shape), compensators)
    if "label_logits" not in table.column_names:
        return apart, None
    logits = torch.from_numpy(flat_values(table, "label_logits")).float()
    by_image = logits.reshape(apart.num_real, num_teachers + 1, -1)
    return apart, by_image.transpose(0, 1).flatten(0, 1)


def features_apart(apart: CompensatedSet, label_logits: Tensor | None) -> dict[str, Any]:
    """The lists among the columns of `columns_apart` as `datasets` describes them."""
    length = apart.compensators[0, 0].numel()
    features = {"values": feature("uint8", length), "compensator": feature("int8", length)}
    if label_logits is not None:
        vectors = len(apart.compensators) + 1
        features["label_logits"] = feature("float16", vectors, label_logits.shape[1])
    return features


def _padded(rows: pa.Array, before: int, after: int) -> pa.Array:
    return pa.concat_arrays([pa.nulls(before, rows.type), rows, pa.nulls(after, rows.type)])
