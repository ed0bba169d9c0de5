"""Losses of task rows under both kinds of models, in nats."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from stillhouse.mixing.collation import IGNORED, TaskBatch


class RowLosses(NamedTuple):
    """`nll`: float32 [B], summed over a row's predicted tokens; `tokens`: int64 [B], how many."""

    nll: Tensor
    tokens: Tensor

    def mean(self) -> Tensor:
        """Mean over all predicted tokens of the batch: the loss of a micro-batch."""
        return self.nll.sum() / self.tokens.sum()


def token_losses(model: PreTrainedModel, batch: TaskBatch) -> tuple[Tensor, Tensor]:
    """NLL of each predicted token, 0 elsewhere: float32 [B, T], and the mask bool [B, T]."""
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


def clipped_excess(proxy: Tensor, reference: Tensor) -> Tensor:
    """Sum over tokens of max(proxy - reference, 0), of losses of one shape that are 0 where no
    token counts: scalar.
    """
    return (proxy - reference).clamp(min=0).sum()


def row_losses(model: PreTrainedModel, batch: TaskBatch) -> RowLosses:
    """The losses of a batch's rows; under autocast, products take its dtype."""
    nll, mask = token_losses(model, batch)
    return RowLosses(nll.sum(1), mask.sum(1))


@torch.no_grad()
def measured_losses(model: PreTrainedModel, batch: TaskBatch) -> tuple[list[float], list[int]]:
    """The losses as numbers."""
    found = row_losses(model, batch)
    return found.nll.tolist(), found.tokens.tolist()
