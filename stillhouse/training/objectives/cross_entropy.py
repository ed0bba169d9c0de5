"""Next-token loss with z-loss, in chunks: logits [B, T, V] are never all in memory.

    nll = mean over predicted tokens of (z - l_target),  z = logsumexp(l)
    objective = nll + z_loss * mean z^2

Gradients are computed in the forward pass, from the same probabilities, so that nothing is computed
twice:  d objective / d l = [p * (1 + 2 * z_loss * z) - onehot(target)] / tokens.
With a mask, means are over its tokens, and the gradients of all others are 0. Logits and gradients
include the architecture's scale and soft cap (`stillhouse.models.head`).
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stillhouse.models.head import Head, LogitRule, head_of
from stillhouse.text.pieces import LOSS_MASK
from stillhouse.training.objectives import LossValue, ObjectiveFacts
from stillhouse.training.objectives.chunked import (
    ChunkLosses,
    chunked_losses,
    product_dtype,
    token_weights,
)


class CrossEntropy:
    """The language-modelling loss over all T-1 predicted positions, EOS included, or those that
    `loss_mask` marks; `z_loss` is the factor of the mean squared logsumexp.
    """

    signals: ClassVar[tuple[str, ...]] = (LOSS_MASK,)

    def __init__(self, facts: ObjectiveFacts, z_loss: float = 1e-4) -> None:
        self._facts, self._z_loss = facts, z_loss

    def __call__(
        self, model: PreTrainedModel, input_ids: Tensor, signals: Mapping[str, Tensor]
    ) -> LossValue:
        hidden = self._facts.hidden(model, input_ids)
        return self.of(hidden, head_of(model, self._facts.rule), input_ids, signals)

    def of(
        self, hidden: Tensor, head: Head, input_ids: Tensor, signals: Mapping[str, Tensor]
    ) -> LossValue:
        """The loss of hidden states [B * (T-1), H] that are known already, under a head."""
        facts, z_loss = self._facts, self._z_loss
        weights = token_weights(signals.get(LOSS_MASK))
        columns = [input_ids[:, 1:].flatten(), *([] if weights is None else [weights])]
        dtype = product_dtype(hidden) if torch.is_grad_enabled() else None
        losses_of = _compiled_losses() if facts.compiled else _losses

        def losses(logits: Tensor, targets: Tensor, share: Tensor | None = None) -> ChunkLosses:
            target, total = targets[:, None], len(hidden)
            with torch.no_grad():
                nll, z, gradient = losses_of(
                    logits.detach(), target, z_loss, total, dtype, facts.rule, share
                )
            return ChunkLosses(nll + z_loss * z.square(), nll, gradient)

        objective, nll, token_nll = chunked_losses(hidden, head, losses, columns, weights)
        return LossValue(objective, nll, token_nll.view(len(input_ids), -1))


class _Losses(NamedTuple):
    """Of a chunk: NLLs [n], logsumexps [n], and the objective's gradient [n, V] or None."""

    nll: Tensor
    z: Tensor
    gradient: Tensor | None


def _losses(
    logits: Tensor,
    target: Tensor,
    z_loss: float,
    total: int,
    dtype: torch.dtype | None,
    rule: LogitRule,
    share: Tensor | None,
) -> _Losses:
    """Losses of a chunk's float32 logits [n, V] and targets [n, 1].

    Args:
        total: tokens of all chunks.
        dtype: of the gradient; None to compute none.
        rule: the gradient is at its input, the product.
        share: weights [n] of the tokens; None if all are 1.
    """
    target_logit = logits.gather(1, target)
    if torch.compiler.is_compiling():  # one pass over the logits, and no scatter
        z = logits.logsumexp(-1, keepdim=True)
        nll = z - target_logit
        log_probs = logits - z
    else:
        log_probs = logits.log_softmax(-1)
        nll = -log_probs.gather(1, target)
        z = nll + target_logit
    if dtype is None:
        return _Losses(nll[:, 0], z[:, 0], None)
    gradient = log_probs.exp_().mul_((1 + 2 * z_loss * z) / total)
    if torch.compiler.is_compiling():
        columns = torch.arange(logits.shape[1], device=logits.device)
        gradient = torch.where(columns == target, gradient - 1 / total, gradient)
    else:
        gradient.scatter_add_(1, target, torch.full_like(nll, -1 / total))
    if share is not None:
        gradient = gradient * share[:, None]
    gradient = rule.product_gradient(gradient, logits)
    return _Losses(nll[:, 0], z[:, 0], gradient.to(dtype))


@cache
def _compiled_losses() -> Callable[..., _Losses]:
    return torch.compile(_losses, dynamic=False)
