"""Losses of logits without all logits: in chunks of positions, gradients made in the forward pass.

Memory holds the logits of one chunk. What the loss of a chunk is, a function says; its gradient
comes from autograd, or from the function itself where that is quicker.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stillhouse.models.head import Head

_CHUNK_LOGITS = {"cpu": 1 << 22, "cuda": 1 << 27}  # 16 MB; 512 MB of a GPU
_MIN_CHUNK = 64


class ChunkLosses(NamedTuple):
    """Losses of a chunk of n positions.

    Attributes:
        objective: what is minimised, [n].
        nll: in nats, [n].
        gradient: where it is known without autograd, [n, V]: of the weighted mean objective over
            the positions of all chunks, at the product of hidden states and head, in their type.
    """

    objective: Tensor
    nll: Tensor
    gradient: Tensor | None = None


LossFunction = Callable[..., ChunkLosses]
"""float32 logits [n, V] and the columns' values [n, ...] -> losses."""


def chunked_losses(
    hidden: Tensor,
    head: Head,
    function: LossFunction,
    columns: Sequence[Tensor],
    weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted mean objective, with gradients to hidden states and head, weighted mean NLL, both
    scalars, and the NLL of each position [n].

    Args:
        hidden: states [n, H] of the positions; under autocast they are multiplied in its type.
        head: of the model, with the parameters that get gradients.
        function: the losses of some positions.
        columns: what it needs beside the logits, [n, ...] each.
        weights: of the positions [n], with mean 1; None if all are 1.
    """
    learning, states = torch.is_grad_enabled(), hidden.to(product_dtype(hidden))
    with torch.autocast(hidden.device.type, enabled=False):
        return _Chunked.apply(
            states,
            head.weight,
            head.bias,
            head.rule,
            function,
            learning,
            weights,
            *columns,
        )  # pyright: ignore[reportReturnType]


def product_dtype(hidden: Tensor) -> torch.dtype:
    """The type that hidden states and head are multiplied in."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def token_weights(mask: Tensor | None) -> Tensor | None:
    """Weights [n] with which a mean over all n tokens is the mean over the marked ones.

    `mask` [B, T] is that of sequences, whose first tokens are not predicted; None: all count.
    """
    if mask is None:
        return None
    marked = mask[:, 1:].flatten().float()
    return marked * (len(marked) / marked.sum().clamp(min=1))


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rule: Any,
        function: LossFunction,
        learning: bool,
        weights: Tensor | None,
        *columns: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        matrix = weight.detach().to(hidden.dtype)
        head = Head(matrix, None if bias is None else bias.detach(), rule)
        size = max(_MIN_CHUNK, _CHUNK_LOGITS[hidden.device.type] // len(matrix))
        hidden_grad = torch.empty_like(hidden)
        head_grad = torch.zeros_like(weight, dtype=torch.float32)
        bias_grad = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        token_nll = hidden.new_empty(len(hidden), dtype=torch.float32)
        objective, nll = hidden.new_zeros(2, dtype=torch.float32)
        size = -(-len(hidden) // -(-len(hidden) // size))  # equal chunks: two shapes at most
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            logits = head.logits(hidden[part]).requires_grad_(learning)
            share = 1.0 if weights is None else weights[part]
            with torch.set_grad_enabled(learning):
                losses = function(logits, *(column[part] for column in columns))
                mean = (losses.objective * share).sum() / len(hidden)
            token_nll[part] = losses.nll.detach()
            objective += mean.detach()
            nll += (token_nll[part] * share).sum()
            if not learning:
                continue
            gradient = losses.gradient
            if gradient is None:
                (gradient,) = torch.autograd.grad(mean, logits)
                with torch.no_grad():
                    gradient = rule.product_gradient(gradient, logits).to(hidden.dtype)
            if bias_grad is not None:
                bias_grad += gradient.sum(0, dtype=torch.float32)
            torch.mm(gradient, matrix, out=hidden_grad[part])
            head_grad += gradient.t() @ hidden[part]
        ctx.save_for_backward(hidden_grad, head_grad, bias_grad)
        nll = nll / len(hidden)
        ctx.mark_non_differentiable(nll, token_nll)
        return objective, nll, token_nll

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if g is None else g * grads[0] for g in ctx.saved_tensors]
        return *scaled, *([None] * (len(ctx.needs_input_grad) - 3))
