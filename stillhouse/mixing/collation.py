"""Rows of tokens as padded batches for both kinds of models.

    encoder_decoder    encoder reads: input EOS          decoder predicts: target EOS
    decoder            reads: [BOS] input target EOS     predicts: target EOS (plain text: all)

The shape depends on the batch's own rows alone, so that a micro-batch is the same computation
whichever worker has it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stillhouse.mixing.arms import Ids, Row

ModelKind: TypeAlias = Literal["encoder_decoder", "decoder"]
IGNORED = -100
_MULTIPLE = 8


@dataclass(frozen=True, slots=True)
class TaskBatch:
    """`input_ids`, `attention_mask`: int64 [B, S]; `labels`: int64 [B, T], -100 where nothing is
    predicted. For a decoder T = S, and labels[b, t] is the token at t, predicted from before it.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "TaskBatch":
        """The batch on a device."""
        moved = (t.to(device) for t in (self.input_ids, self.attention_mask, self.labels))
        return TaskBatch(*moved)


@dataclass(frozen=True, slots=True)
class Collator:
    """Makes batches for one kind of model."""

    kind: ModelKind
    eos_id: int
    pad_id: int
    bos_id: int | None = None
    """Stands before what a decoder reads."""

    def __call__(self, rows: Sequence[Row]) -> TaskBatch:
        """A batch of rows; at least one."""
        eos = np.array([self.eos_id], np.int32)
        targets = [np.concatenate([row.target_ids, eos]) for row in rows]
        if self.kind == "encoder_decoder":
            inputs = [np.concatenate([row.input_ids, eos]) for row in rows]
            labels = _padded(targets, IGNORED)
        else:
            bos = [] if self.bos_id is None else [self.bos_id]
            given = [np.concatenate([np.array(bos, np.int32), row.input_ids]) for row in rows]
            pairs = list(zip(given, targets, strict=True))
            inputs = [np.concatenate([read, target]) for read, target in pairs]
            hidden = [
                np.concatenate([np.full(len(read), IGNORED, np.int32), target])
                for read, target in pairs
            ]
            labels = _padded(hidden, IGNORED)
        mask = _padded([np.ones(len(ids), np.int32) for ids in inputs], 0)
        return TaskBatch(
            *(torch.from_numpy(a) for a in (_padded(inputs, self.pad_id), mask, labels))
        )


def _padded(rows: Sequence[Ids], value: int) -> NDArray[np.int64]:
    longest = max(len(row) for row in rows)
    filled = np.full((len(rows), -(-longest // _MULTIPLE) * _MULTIPLE), value, np.int64)
    for i, row in enumerate(rows):
        filled[i, : len(row)] = row
    return filled
