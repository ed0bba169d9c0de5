"""Micro-batches: which worker takes which, rows as padded batches, and their losses in nats.

The G slots of a step, sorted by arm, are cut into one run for each of N workers. At most N - 1 arms
then lie on two workers or more, and only for these do gradients have to travel to be compared.

    encoder_decoder    encoder reads: input EOS          decoder predicts: target EOS
    decoder            reads: [BOS] input target EOS     predicts: target EOS (plain text: all)

The shape depends on the batch's own rows alone, so that a micro-batch is the same computation
whichever worker has it.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from stillhouse.mixing.arms import Ids, Row

IGNORED = -100
_MULTIPLE = 8


class Slot(NamedTuple):
    """One micro-batch of a step: its arm, its number in the step, and which of the arm's batches
    it is.
    """

    arm: int
    number: int
    batch: int


def slots_of(arms: Sequence[int], drawn: Mapping[int, int]) -> list[Slot]:
    """A step's slots in the order of their arms, which were `drawn` so often before the step."""
    seen, slots = Counter(drawn), list[Slot]()
    for number, arm in enumerate(arms):
        slots.append(Slot(arm, number, seen[arm]))
        seen[arm] += 1
    return sorted(slots)


def share(count: int, rank: int, size: int) -> range:
    """The run of `count` things that worker `rank` of `size` takes; sizes differ by one at most."""
    return range(count * rank // size, count * (rank + 1) // size)


def spanning(slots: Sequence[Slot], size: int) -> list[int]:
    """The arms that lie on several workers, ascending."""
    owners: dict[int, set[int]] = {}
    for rank in range(size):
        for i in share(len(slots), rank, size):
            owners.setdefault(slots[i].arm, set()).add(rank)
    return sorted(arm for arm, ranks in owners.items() if len(ranks) > 1)


class TaskBatch(NamedTuple):
    """`input_ids`, `attention_mask`: int64 [B, S]; `labels`: int64 [B, T], -100 where nothing is
    predicted. For a decoder T = S, and labels[b, t] is the token at t, predicted from before it.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "TaskBatch":
        """The batch on a device."""
        return TaskBatch(*(tensor.to(device) for tensor in self))


@dataclass(frozen=True, slots=True)
class Collator:
    """Makes batches for one kind of model; `bos_id` stands before what a decoder reads."""

    encoder_decoder: bool
    eos_id: int
    pad_id: int
    bos_id: int | None = None

    def __call__(self, rows: Sequence[Row]) -> TaskBatch:
        """A batch of rows; at least one."""
        eos = np.array([self.eos_id], np.int32)
        targets = [np.concatenate([row.target_ids, eos]) for row in rows]
        if self.encoder_decoder:
            inputs = [np.concatenate([row.input_ids, eos]) for row in rows]
            labels = targets
        else:
            bos = np.array([] if self.bos_id is None else [self.bos_id], np.int32)
            read = [np.concatenate([bos, row.input_ids]) for row in rows]
            pairs = list(zip(read, targets, strict=True))
            inputs = [np.concatenate(pair) for pair in pairs]
            labels = [np.concatenate([np.full(len(ids), IGNORED), target]) for ids, target in pairs]
        mask = [np.ones(len(ids), np.int32) for ids in inputs]
        filled = _padded(inputs, self.pad_id), _padded(mask, 0), _padded(labels, IGNORED)
        return TaskBatch(*map(torch.from_numpy, filled))


def _padded(rows: Sequence[Ids], value: int) -> NDArray[np.int64]:
    longest = max(len(row) for row in rows)
    filled = np.full((len(rows), -(-longest // _MULTIPLE) * _MULTIPLE), value, np.int64)
    for i, row in enumerate(rows):
        filled[i, : len(row)] = row
    return filled


def token_losses(model: PreTrainedModel, batch: TaskBatch) -> tuple[Tensor, Tensor]:
    """NLL of each predicted token, 0 elsewhere: float32 [B, T], and the mask bool [B, T].

    Under autocast, products take its dtype.
    """
    network: Any = model
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    labels = batch.labels
    if model.config.is_encoder_decoder:
        shifted = network.prepare_decoder_input_ids_from_labels(labels=labels)
        logits = network(**inputs, decoder_input_ids=shifted, use_cache=False).logits
    else:
        logits = network(**inputs, use_cache=False).logits[:, :-1]
        labels = labels[:, 1:]
    flat = functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return flat.view(labels.shape), labels != IGNORED
