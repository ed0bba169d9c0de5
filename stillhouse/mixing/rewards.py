"""Rewards of arms: FLAD's, by how alike the target's gradient g and an arm's gradient a are
(section 3), and those by losses.

    alignment (GA)  = cos(g, a)                                        in [-1, 1]
    magnitude (GMS) = (2 |g||a| + 1e-8) / (|g|^2 + |a|^2 + 1e-8)       in (0, 1]
    aggregate       = (1 + GA) / 2 + GMS                               in (0, 2]

GA does not see a gradient's scale, GMS does: give it means on both sides, not sums over different
numbers of micro-batches.

Gradients are those of a few named parameters, kept apart by arm while training accumulates as
usual. A hook on each parameter sees the gradient of one backward pass before it is added to
`.grad`, so an arm's gradient is never a difference of accumulated ones, which loses its digits in
bfloat16. Under DDP the hook runs before the reduction: what it sees is this worker's own.
"""

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stillhouse.errors import ModelError
from stillhouse.mixing.policy import RewardKind, RewardName

TARGET = -1
"""Stands for an arm where micro-batches are the target's."""
_EPS = 1e-8
_CHUNK = 1 << 18  # a product of two stays in a core's cache


class Aim:
    """What arms are compared with: the target's gradient, flat [P] of any float dtype.

    Making one waits for the device, and so does each reward.
    """

    def __init__(self, gradient: Tensor) -> None:
        self._parts = gradient.split(_CHUNK)
        self._square = float(_dot(self._parts, self._parts))

    def reward(self, arm: Tensor, name: RewardName) -> float:
        """The reward of an arm's flat gradient [P]. GA is 0 where a gradient is zero."""
        parts = arm.split(_CHUNK)
        products: list[float] = torch.stack([_dot(self._parts, parts), _dot(parts, parts)]).tolist()
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
    """Float32 in chunks whose sums are added up in float64, and `sum`, which adds in pairs, not
    `torch.dot`, whose error is the BLAS library's: over the 66 M values of T5-XL's head it is off
    by up to 2 %, in chunks of 65,536 still by 4e-6.
    """
    parts = [(a.float() * b.float()).sum() for a, b in zip(first, second, strict=True)]
    return torch.stack(parts).to("cpu", torch.float64).sum()


def compared_parameters(model: PreTrainedModel, part: str) -> dict[str, nn.Parameter]:
    """The trained parameters whose gradients rewards compare, in the model's order.

    Args:
        part: of their names; or `output_head`, the output projection [V, H], what FLAD's released
            runs compare. Where that is tied to the input embeddings, its gradient holds both uses.

    Raises:
        ModelError: no name contains `part`.
    """
    named = dict(model.named_parameters())
    if part == "output_head":
        head = model.get_output_embeddings().weight  # pyright: ignore[reportOptionalMemberAccess]
        return {name: value for name, value in named.items() if value is head}
    found = {n: value for n, value in named.items() if part in n and value.requires_grad}
    if not found:
        names = (name.rsplit(".", 2)[-2] for name in named if "." in name)
        known = ", ".join(dict.fromkeys(names))
        raise ModelError(
            f"no trained parameter's name contains {part!r}: set `policy.parameters` to "
            f"`output_head` or to a part of a name with one of {known}"
        )
    return found


class GradientCapture:
    """Sums each arm's gradients of some parameters in float32, until they are taken.

    Memory: 4 bytes a value for each arm that is not taken yet. `close` removes the hooks.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._sums: dict[int, list[Tensor | None]] = {}
        self._arm: int | None = None
        self._hooks = [
            parameter.register_hook(partial(self._add, index=index))
            for index, parameter in enumerate(self._parameters)
        ]

    @contextmanager
    def arm(self, arm: int) -> Generator[None, None, None]:
        """A micro-batch of one arm: the one backward pass inside is credited to it."""
        self._sums.setdefault(arm, [None] * len(self._parameters))
        self._arm = arm
        try:
            yield
        finally:
            self._arm = None

    def take(self, arm: int) -> Tensor:
        """Sum of the arm's gradients, which is forgotten then: float32[P], the parameters
        flattened one after the other; zeros for an arm that was not seen.
        """
        sums = self._sums.pop(arm, None) or [None] * len(self._parameters)
        parts = [
            torch.zeros(parameter.numel(), device=parameter.device) if found is None else found
            for parameter, found in zip(self._parameters, sums, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def _add(self, gradient: Tensor, index: int) -> None:
        if self._arm is None:
            return
        flat, sums = gradient.detach().flatten(), self._sums[self._arm]
        found = sums[index]
        if found is None:
            sums[index] = flat.to(torch.float32, copy=True)
        else:
            found += flat


class BatchLoss(NamedTuple):
    """Of one micro-batch; `excess` over the reference's loss, clipped at each token (DoReMi)."""

    arm: int
    number: int
    nll: float
    tokens: float
    excess: float


def clipped_excess(proxy: Tensor, reference: Tensor) -> Tensor:
    """Sum over tokens of max(proxy - reference, 0), of losses of one shape that are 0 where no
    token counts: scalar.
    """
    return (proxy - reference).detach().clamp(min=0).sum()


def loss_rewards(rows: Sequence[BatchLoss], kind: RewardKind) -> dict[int, float]:
    """By arm, the mean over its tokens in a step: of the `loss`, or of the clipped `excess`."""
    rewards: dict[int, float] = {}
    for arm in {row.arm for row in rows} - {TARGET}:
        own = [row for row in rows if row.arm == arm]
        sums = [row.nll if kind == "loss" else row.excess for row in own]
        rewards[arm] = sum(sums) / sum(row.tokens for row in own)
    return rewards
