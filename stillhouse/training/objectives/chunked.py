"""Losses of logits without all logits: in chunks of positions, gradients made in the forward pass.

Memory holds the logits of one chunk. What the loss of a chunk is, a function says; its gradient at
the logits comes from autograd, or from the function itself where that is quicker.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stillhouse.models.head import Head

_CHUNK_LOGITS = {"cpu": 1 << 22, "cuda": 1 << 27}  # 16 MB; 512 MB of a GPU
_MIN_CHUNK = 64


class ChunkLosses(NamedTuple):
    """Of a chunk of n positions: what is minimised [n], NLLs [n], and, where it is known without
    autograd, the gradient [n, V] of the summed objective at the logits.
    """

    objective: Tensor
    nll: Tensor
    gradient: Tensor | None = None


LossFunction = Callable[..., ChunkLosses]
"""float32 logits [n, V] and the columns' values [n, ...] -> losses."""


def chunked_losses(
    hidden: Tensor, head: Head, function: LossFunction, columns: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The summed objective, a scalar with gradients to hidden states and head, and NLLs [n].

    Args:
        hidden: states [n, H] of the positions, in the precision that they are multiplied in.
        head: of the model, with the parameters that get gradients.
        function: the losses of some positions.
        columns: what it needs beside the logits, [n, ...] each.
    """
    learning = torch.is_grad_enabled()
    return _Chunked.apply(hidden, head.weight, head.bias, head.rule, function, learning, *columns)  # pyright: ignore[reportReturnType]


def token_weights(mask: Tensor) -> Tensor:
    """Weights [n] with which a mean over all n tokens is the mean over the marked ones [n]."""
    mask = mask.float()
    return mask * (len(mask) / mask.sum().clamp(min=1))


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
        *columns: Tensor,
    ) -> tuple[Tensor, Tensor]:
        matrix = weight.detach().to(hidden.dtype)
        head = Head(matrix, None if bias is None else bias.detach(), rule)
        size = max(_MIN_CHUNK, _CHUNK_LOGITS[hidden.device.type] // len(matrix))
        hidden_grad = torch.empty_like(hidden)
        head_grad = torch.zeros_like(weight, dtype=torch.float32)
        bias_grad = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        nll = hidden.new_empty(len(hidden), dtype=torch.float32)
        total = hidden.new_zeros((), dtype=torch.float32)
        size = -(-len(hidden) // -(-len(hidden) // size))  # equal chunks: two shapes at most
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            logits = head.logits(hidden[part]).requires_grad_(learning)
            with torch.set_grad_enabled(learning):
                found = function(logits, *(column[part] for column in columns))
                summed = found.objective.sum()
            nll[part] = found.nll.detach()
            total += summed.detach()
            if not learning:
                continue
            gradient = found.gradient
            if gradient is None:
                (gradient,) = torch.autograd.grad(summed, logits)
            with torch.no_grad():
                gradient = rule.product_gradient(gradient, logits).to(hidden.dtype)
                if bias_grad is not None:
                    bias_grad += gradient.sum(0, dtype=torch.float32)
                torch.mm(gradient, matrix, out=hidden_grad[part])
                head_grad += gradient.t() @ hidden[part]
        ctx.save_for_backward(hidden_grad, head_grad, bias_grad)
        ctx.mark_non_differentiable(nll)
        return total, nll

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found = [None if g is None else g * grads[0] for g in ctx.saved_tensors]
        return *found, *([None] * (len(ctx.needs_input_grad) - 3))
