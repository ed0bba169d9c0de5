"""Next-token loss with z-loss, in chunks: memory for some logits, not for all of [B, T, V].

    nll = mean over predicted tokens of (z - l_target),  z = logsumexp(l)
    objective = nll + z_loss * mean z^2

Gradients are made in the forward pass, while a chunk's probabilities are at hand, so nothing is
computed twice:  d objective / d l = [p * (1 + 2 * z_loss * z) - onehot(target)] / tokens.
What the architecture does to its logits (`stillhouse.models.head`) is in them, and in gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stillhouse.models.head import Head, LogitRule, head_of, predicting, with_bos

_CHUNK_LOGITS = {"cpu": 1 << 22, "cuda": 1 << 27}  # 16 MB; 512 MB of a GPU
_MIN_CHUNK = 64


class LossValue(NamedTuple):
    """What a step minimises, and the mean NLL in nats that is reported; both scalars.

    `token_nll` float32 [B, T-1], where the loss has it, is what training losses by source are
    made of; column t-1 belongs to position t.
    """

    objective: Tensor
    nll: Tensor
    token_nll: Tensor | None = None


@dataclass(frozen=True, slots=True)
class NextTokenLoss:
    """The loss of language modelling over all T-1 predicted positions, EOS included.

    `rule` is the model's (`logit_rule`); a `bos_id` stands before every sequence.
    """

    z_loss: float
    rule: LogitRule
    bos_id: int | None = None
    compiled: bool = False
    """Whether the chunks' losses and gradients are one graph."""

    def __call__(self, model: PreTrainedModel, input_ids: Tensor) -> LossValue:
        """input_ids [B, T] on the model's device; under autocast, products take its dtype."""
        body: Any = model.base_model
        given = with_bos(input_ids, self.bos_id)
        hidden = body(input_ids=given, use_cache=False).last_hidden_state
        hidden = predicting(hidden, input_ids.shape[1])
        head = head_of(model, self.rule)
        kind = hidden.device.type
        learning = torch.is_grad_enabled()
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        with torch.autocast(kind, enabled=False):
            objective, nll, token_nll = _ChunkedCrossEntropy.apply(
                hidden.to(dtype),
                head.weight,
                head.bias,
                self.rule,
                input_ids[:, 1:].flatten(),
                self.z_loss,
                learning,
                _compiled_losses() if self.compiled else _losses,
            )  # pyright: ignore[reportGeneralTypeIssues]
        return LossValue(objective, nll, token_nll.view(len(input_ids), -1))


class _Losses(NamedTuple):
    """Of a chunk: NLLs [n], logsumexps [n], and the objective's gradient [n, V] where asked for."""

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
) -> _Losses:
    """Of float32 logits [n, V] and targets [n, 1]; the gradient is that before `rule`.

    Args:
        logits, target: of a chunk.
        z_loss: factor of the mean squared logsumexp.
        total: tokens of all chunks.
        dtype: of the gradient; None for none.
        rule: what made the logits of the product that the gradient goes to.
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
    gradient = rule.product_gradient(gradient, logits)
    return _Losses(nll[:, 0], z[:, 0], gradient.to(dtype))


@cache
def _compiled_losses() -> Callable[..., _Losses]:
    return torch.compile(_losses, dynamic=False)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """hidden [n, H], weight [V, H], bias [V] or None, targets [n] -> objective, NLL (scalars) and
    NLLs [n].
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rule: LogitRule,
        targets: Tensor,
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
            losses, z, grad = losses_of(logits, target, z_loss, len(hidden), dtype, rule)
            token_nll[part] = losses
            nll += losses.sum()
            squares += z.square().sum()
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
        return hidden, weight, bias, None, None, None, None, None
