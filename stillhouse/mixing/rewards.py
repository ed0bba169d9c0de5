"""Rewards of arms: FLAD's (section 3), by how similar the target's gradient g and an arm's
gradient a are, and those by losses.

    alignment (GA)  = cos(g, a)                                        in [-1, 1]
    magnitude (GMS) = (2 |g||a| + 1e-8) / (|g|^2 + |a|^2 + 1e-8)       in (0, 1]
    aggregate       = (1 + GA) / 2 + GMS                               in (0, 2]

GA does not see a gradient's scale, GMS does: give it means on both sides, not sums over different
numbers of micro-batches.

The gradients are those of a few named parameters, kept separately by arm while training
accumulates as usual. Each backward pass is captured before it is added to what was accumulated: a
difference of accumulated gradients would lose its digits in bfloat16.
"""

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stillhouse.errors import ModelError
from stillhouse.mixing.policy import RewardKind, RewardName

TARGET = -1
"""In place of an arm's number for micro-batches of the target."""
_EPS = 1e-8
_CHUNK = 1 << 18  # a product of two stays in a core's cache


class TargetGradient:
    """The target's gradient, flat [P] of any float dtype, that arms' gradients are compared with.

    Making one waits for the device, and so does each reward.
    """

    def __init__(self, gradient: Tensor) -> None:
        self._chunks = gradient.split(_CHUNK)
        self._square = float(_dot(self._chunks, self._chunks))

    def reward(self, gradient: Tensor, name: RewardName) -> float:
        """The reward of an arm's flat gradient [P]. GA is 0 where either gradient is zero."""
        chunks = gradient.split(_CHUNK)
        products: list[float] = torch.stack(
            [_dot(self._chunks, chunks), _dot(chunks, chunks)]
        ).tolist()
        dot, square = products
        norms = math.sqrt(self._square) * math.sqrt(square)
        alignment = dot if math.isnan(dot) else max(-1.0, min(1.0, dot / (norms or 1.0)))
        magnitude = (2 * norms + _EPS) / (self._square + square + _EPS)
        match name:
            case "alignment":
                return alignment
            case "magnitude":
                return magnitude
            case "aggregate":
                return (1 + alignment) / 2 + magnitude


def _dot(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Dot product of chunked vectors: float32 within a chunk, float64 between them.

    Within a chunk `sum`, which adds in pairs, not `torch.dot`, whose error is the BLAS library's:
    over the 66 M values of T5-XL's head it is off by up to 2 %, in chunks of 65,536 by 4e-6.
    """
    parts = [(a.float() * b.float()).sum() for a, b in zip(first, second, strict=True)]
    return torch.stack(parts).to("cpu", torch.float64).sum()


def compared_parameters(model: PreTrainedModel, part: str) -> dict[str, nn.Parameter]:
    """The trained parameters whose gradients are compared, in the model's order.

    Args:
        part: of their names; or `output_head`, the output projection [V, H], which FLAD's released
            runs compare. If it is tied to the input embeddings, its gradient includes both uses.

    Raises:
        ModelError: no name contains `part`.
    """
    named = dict(model.named_parameters())
    if part == "output_head":
        head = model.get_output_embeddings().weight  # pyright: ignore[reportOptionalMemberAccess]
        return {name: value for name, value in named.items() if value is head}
    matching = {n: value for n, value in named.items() if part in n and value.requires_grad}
    if not matching:
        names = (name.rsplit(".", 2)[-2] for name in named if "." in name)
        known = ", ".join(dict.fromkeys(names))
        raise ModelError(
            f"no trained parameter's name contains {part!r}: set `policy.parameters` to "
            f"`output_head` or to a part of a name with one of {known}"
        )
    return matching


class GradientCapture:
    """Sums each arm's gradients of some parameters in float32, until they are taken.

    Memory: 4 bytes a value for each arm not taken yet.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._sums: dict[int, list[Tensor]] = {}

    @contextmanager
    def arm(self, arm: int) -> Generator[None, None, None]:
        """Credit the one backward pass inside to this arm, and accumulate it as usual."""
        accumulated = [parameter.grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        yield
        sums = self._sums.setdefault(arm, [])
        for i, (parameter, earlier) in enumerate(zip(self._parameters, accumulated, strict=True)):
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            if i < len(sums):
                sums[i] += gradient.flatten()
            else:
                sums.append(gradient.flatten().to(torch.float32, copy=True))
            parameter.grad = gradient if earlier is None else earlier.add_(gradient)

    def take(self, arm: int) -> Tensor:
        """Remove and return the sum of an arm's gradients: float32[P], the parameters flattened
        one after another; zeros for an arm without a backward pass.
        """
        zeros = (torch.zeros(p.numel(), device=p.device) for p in self._parameters)
        sums = self._sums.pop(arm, None) or list(zeros)
        return sums[0] if len(sums) == 1 else torch.cat(sums)


class BatchLoss(NamedTuple):
    """Sums over the tokens of one micro-batch: NLL, their number, and DoReMi's clipped excess."""

    arm: int
    number: int
    nll: float
    tokens: float
    excess: float


def loss_rewards(rows: Sequence[BatchLoss], kind: RewardKind) -> dict[int, float]:
    """The mean `loss` or clipped `excess` over each arm's tokens in a step."""
    rewards: dict[int, float] = {}
    for arm in {row.arm for row in rows} - {TARGET}:
        own = [row for row in rows if row.arm == arm]
        sums = [row.nll if kind == "loss" else row.excess for row in own]
        rewards[arm] = sum(sums) / sum(row.tokens for row in own)
    return rewards
