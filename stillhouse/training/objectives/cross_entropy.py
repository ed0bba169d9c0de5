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
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stillhouse.models.head import Head, LogitRule, head_of
from stillhouse.training.objectives import LossValue, ObjectiveFacts
from stillhouse.training.task import LOSS_MASK

_CHUNK_LOGITS = {"cpu": 1 << 22, "cuda": 1 << 27}  # 16 MB; 512 MB of a GPU
_MIN_CHUNK = 64


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
        facts = self._facts
        hidden = facts.hidden(model, input_ids)
        head = head_of(model, facts.rule)
        kind = hidden.device.type
        mask = signals.get(LOSS_MASK)
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        with torch.autocast(kind, enabled=False):
            objective, nll, token_nll = _ChunkedCrossEntropy.apply(
                hidden.to(dtype),
                head.weight,
                head.bias,
                facts.rule,
                input_ids[:, 1:].flatten(),
                None if mask is None else _weights(mask[:, 1:].flatten().float()),
                self._z_loss,
                torch.is_grad_enabled(),
                _compiled_losses() if facts.compiled else _losses,
            )  # pyright: ignore[reportGeneralTypeIssues]
        return LossValue(objective, nll, token_nll.view(len(input_ids), -1))


def _weights(mask: Tensor) -> Tensor:
    """Weights [n] with which a mean over all n tokens is the mean over the marked ones."""
    return mask * (len(mask) / mask.sum().clamp(min=1))


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


class _ChunkedCrossEntropy(torch.autograd.Function):
    """hidden [n, H], weight [V, H], bias [V] or None, targets [n], token weights [n] or None ->
    objective and NLL (scalars), NLLs [n].
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rule: LogitRule,
        targets: Tensor,
        shares: Tensor | None,
        z_loss: float,
        learning: bool,
        losses_of: Callable[..., _Losses],
    ) -> tuple[Tensor, Tensor, Tensor]:
        matrix = weight.detach().to(hidden.dtype)
        head = Head(matrix, None if bias is None else bias.detach(), rule)
        chunk = max(_MIN_CHUNK, _CHUNK_LOGITS[hidden.device.type] // len(matrix))
        hidden_grad = torch.empty_like(hidden)
        head_grad = torch.zeros_like(weight, dtype=torch.float32)
        bias_grad = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        token_nll = hidden.new_empty(len(hidden), dtype=torch.float32)
        nll, squares = hidden.new_zeros(2, dtype=torch.float32)
        dtype = hidden.dtype if learning else None
        length = -(-len(hidden) // -(-len(hidden) // chunk))  # equal chunks: two shapes at most
        for start in range(0, len(hidden), length):
            part = slice(start, start + length)
            logits, target = head.logits(hidden[part]), targets[part, None]
            share = None if shares is None else shares[part]
            losses, z, grad = losses_of(logits, target, z_loss, len(hidden), dtype, rule, share)
            token_nll[part] = losses
            nll += (losses if share is None else losses * share).sum()
            squares += (z.square() if share is None else z.square() * share).sum()
            if grad is None:
                continue
            if bias_grad is not None:
                bias_grad += grad.sum(0, dtype=torch.float32)
            torch.mm(grad, matrix, out=hidden_grad[part])
            head_grad += grad.t() @ hidden[part]
        ctx.save_for_backward(hidden_grad, head_grad, bias_grad)
        nll, squares = nll / len(hidden), squares / len(hidden)
        ctx.mark_non_differentiable(nll, token_nll)
        return nll + z_loss * squares, nll, token_nll

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = (g if g is None else g * grads[0] for g in ctx.saved_tensors)
        return hidden, weight, bias, None, None, None, None, None, None
