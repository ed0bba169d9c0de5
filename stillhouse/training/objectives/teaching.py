"""What objectives share whose teachers run in the training workers (`needs_models`).

Teachers are in evaluation mode and keep no graph. States are those of the T-1 positions that
predict a token; a causal model has no CLS token, so that a sequence is represented by the mean of
its states at the positions that count.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stillhouse.errors import InputError, SpecError
from stillhouse.models.head import predicting
from stillhouse.text.pieces import LOSS_MASK
from stillhouse.training.objectives import ObjectiveFacts
from stillhouse.training.objectives.distil import promoted

_TRIED = 16
"""Tokens that a teacher is tried on."""


def only_teacher(facts: ObjectiveFacts, name: str) -> PreTrainedModel:
    """The one teacher of an objective.

    Raises:
        SpecError: none, or several.
    """
    if len(facts.models) != 1:
        raise SpecError(
            f"`train.objective.teachers`: {name} learns from one model, not {len(facts.models)}"
        )
    return facts.models[0]


@torch.no_grad()
def check_teacher(model: PreTrainedModel, vocab_size: int, key: str) -> None:
    """Refuse a teacher, `key` in the spec, whose logits after a few tokens are not finite.

    Raises:
        InputError: they are not.
    """
    some = torch.arange(min(vocab_size, _TRIED), device=model.device)[None]
    caller: Any = model
    if not bool(caller(input_ids=some).logits[..., :vocab_size].isfinite().all()):
        raise InputError(
            f"`{key}`: its logits are not finite: it is broken, or does not fit `train.dtype`"
        )


def layer_states(model: PreTrainedModel, length: int, **given: Tensor) -> list[Tensor]:
    """States [B, T-1, H] of the embeddings and after every layer, at the predicting positions.

    The last ones are those that the head reads, after the final norm.

    Args:
        length: T, without BOS.
        given: `input_ids` or `inputs_embeds`, with BOS.
    """
    body: Any = model.base_model
    states = body(**given, use_cache=False, output_hidden_states=True).hidden_states
    return [predicting(one, length).view(len(one), length - 1, -1) for one in states]


def counted(input_ids: Tensor, signals: Mapping[str, Tensor]) -> Tensor:
    """Which of the T-1 predicted tokens count: float32 [B, T-1] of 0 and 1."""
    mask = signals.get(LOSS_MASK)
    if mask is None:
        return torch.ones_like(input_ids[:, 1:], dtype=torch.float32)
    return mask[:, 1:].float()


def pooled(states: Tensor, mask: Tensor) -> Tensor:
    """The mean state [B, H] of [B, T, H] over the positions that count; 0 without any."""
    total = (promoted(states) * mask[..., None]).sum(1)
    return total / mask.sum(1, keepdim=True).clamp(min=1)


def row_shares(mask: Tensor) -> Tensor:
    """What each row weighs in a mean over the tokens that count: [B], adding up to 1."""
    counts = mask.sum(1)
    return counts / counts.sum().clamp(min=1)
