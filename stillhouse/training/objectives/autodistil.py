"""AutoDistil (Xu et al. 2022, arXiv 2201.12507): one super-network, many small students.

A sub-network uses the leading rows and columns of every matrix, and the first layers. Each step
trains the largest, the smallest and two random sub-networks; their gradients add up. Every one
imitates the relations of the teacher's last layer: Q, K and V are cut into relation heads, and
Q Q^T, K K^T, V V^T (over sqrt d) are compared, as mean squared errors in the authors' code, as KL
of softmaxes in the papers of this family.

    train.objective: {name: autodistil, teachers: [{path: T}], layers: [2, 4], hidden: [64, 128]}

Sub-networks have the sizes of all combinations of `layers`, `heads`, `hidden` and `mlp_ratios`. The
trained model is the super-network, a plain transformers model; `best_sub_network` finds a student
in it. The graphs of the four sub-networks are in memory at once.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from stillhouse.errors import SpecError
from stillhouse.models.head import Head, head_of, predicting, with_bos
from stillhouse.models.sub_networks import (
    ARCHITECTURES,
    SubModel,
    SubNetwork,
    head_width,
    own_size,
    projections,
    shape_of,
)
from stillhouse.text.pieces import LOSS_MASK
from stillhouse.training.objectives import LossValue, ObjectiveFacts
from stillhouse.training.objectives.cross_entropy import CrossEntropy
from stillhouse.training.objectives.distil import promoted
from stillhouse.training.objectives.teaching import counted, only_teacher, row_shares


def search_space(
    layers: Sequence[int],
    heads: Sequence[int],
    hidden: Sequence[int],
    mlp_ratios: Sequence[float],
    num_params: Callable[[SubNetwork], float],
) -> list[SubNetwork]:
    """All combinations, from the smallest number of parameters to the largest."""
    combined = (SubNetwork(*sizes) for sizes in product(layers, heads, hidden, mlp_ratios))
    return sorted(combined, key=lambda one: (num_params(one), one))


def sandwich(space: Sequence[SubNetwork], step: int, num_random: int = 2) -> list[SubNetwork]:
    """The sub-networks of a step: the largest, the smallest, random others; the same anywhere."""
    draws = random.Random(step).sample(list(space[1:-1]), num_random)
    return [space[-1], space[0], *draws]


def relations(states: Tensor, num_heads: int = 12) -> Tensor:
    """States [B, T, W] -> scores [B, heads, T, T] of the relation heads, over sqrt(d).

    W is cut to a multiple of `num_heads`.
    """
    width = states.shape[-1] // num_heads
    cut = states[..., : width * num_heads].unflatten(-1, (num_heads, width)).transpose(1, 2)
    return cut @ cut.transpose(-1, -2) / width**0.5


def relation_losses(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    num_heads: int = 12,
    softmaxed: bool = False,
) -> Tensor:
    """Mean squared error of the relations of Q, K and V [B, T, W], added up: [B].

    `softmaxed` compares them by KL after a softmax, as the papers of this family state.
    """
    losses = list[Tensor]()
    for own, other in zip(student, teacher, strict=True):
        mine, theirs = (relations(promoted(x), num_heads) for x in (own, other.detach()))
        if softmaxed:
            log_theirs, log_mine = theirs.log_softmax(-1), mine.log_softmax(-1)
            divergences = (log_theirs.exp() * (log_theirs - log_mine)).sum(-1)
            losses.append(divergences.mean((1, 2)))
        else:
            losses.append((mine - theirs).square().mean((1, 2, 3)))
    return torch.stack(losses).sum(0)


def space_of(
    config: PreTrainedConfig,
    layers: Sequence[int] = (),
    heads: Sequence[int] = (),
    hidden: Sequence[int] = (),
    mlp_ratios: Sequence[float] = (),
) -> list[SubNetwork]:
    """The sub-networks of a model; sizes that are not given are the model's own.

    Raises:
        SpecError: fewer than four, an architecture that is not cut, or a largest one that is not
            the whole model.
    """
    if config.model_type not in ARCHITECTURES:
        raise SpecError(
            f"autodistil cuts {' and '.join(ARCHITECTURES)}, not {config.model_type!r}: set "
            "`model.architecture`"
        )
    whole = own_size(config)
    space = search_space(
        layers or [whole.layers],
        heads or [whole.heads],
        hidden or [whole.hidden],
        mlp_ratios or [whole.mlp_ratio],
        lambda one: shape_of(config, one).matmul_parameters,
    )
    if space[-1] != whole:
        raise SpecError(
            f"`train.objective`: the largest sub-network {space[-1]} is not the model: {whole}"
        )
    if len(space) < 4:
        raise SpecError(
            f"`train.objective`: only {len(space)} sub-networks, a step trains four: give more "
            "`layers`, `heads`, `hidden` or `mlp_ratios`"
        )
    return space


class AutoDistil:
    """The relation losses of four sub-networks, added up.

    Reported is the NLL of the whole model. Only `hard_weight` trains what follows the last layer's
    Q, K and V: without it a student has to be fine-tuned to be a language model.

    Args:
        facts: of the training.
        layers, heads, hidden, mlp_ratios: sizes of the sub-networks.
        relations: how relations are compared.
        relation_heads: into which Q, K and V are cut.
        hard_weight: of each sub-network's cross-entropy, beside its relations.

    Raises:
        SpecError: as `space_of`; or workers with shares of the layers.
    """

    needs_models: ClassVar[bool] = True
    signals: ClassVar[tuple[str, ...]] = (LOSS_MASK,)

    def __init__(
        self,
        facts: ObjectiveFacts,
        layers: Sequence[int] = (),
        heads: Sequence[int] = (),
        hidden: Sequence[int] = (),
        mlp_ratios: Sequence[float] = (),
        relations: Literal["mse", "kl"] = "mse",
        relation_heads: int = 12,
        hard_weight: float = 0.0,
    ) -> None:
        if facts.group.sharded:
            raise SpecError("`train.sharding: fsdp`: autodistil slices whole layers; use none")
        if relations not in ("mse", "kl"):
            raise SpecError(f"`train.objective.relations: {relations}`: use mse or kl")
        config = facts.configs[0]
        self.space = space_of(config, layers, heads, hidden, mlp_ratios)
        self._facts, self._teacher = facts, only_teacher(facts, "autodistil")
        body: Any = self._teacher.base_model
        with projections(body):
            pass  # it has them
        # a compiled layer does not see hooks that come and go
        body.layers[-1]._compiled_call_impl = None
        narrow = min(one.heads for one in self.space) * head_width(config)
        if relation_heads > narrow:
            raise SpecError(
                f"`train.objective.relation_heads: {relation_heads}`: the narrowest Q, K and V "
                f"have {narrow} columns"
            )
        self._relation_heads, self._softmaxed = relation_heads, relations == "kl"
        self._hard, self._plain = hard_weight, CrossEntropy(facts, 0.0)
        self._bodies: dict[SubNetwork, SubModel] = {}
        self._step = 0

    def at_step(self, step: int, num_steps: int) -> None:
        """See `Objective`."""
        self._step = step

    def __call__(
        self, model: PreTrainedModel, input_ids: Tensor, signals: Mapping[str, Tensor]
    ) -> LossValue:
        """See `Objective`. Without gradients, as on held-out sequences, the plain loss."""
        if not torch.is_grad_enabled():
            return self._plain(model, input_ids, signals)
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            raise SpecError(
                "`train.activation_checkpointing`: autodistil runs slices of the model, which "
                "cannot be computed again: lower `train.micro_batch` instead"
            )
        given, facts = with_bos(input_ids, self._facts.bos_id), self._facts
        taught = teacher_projections(self._teacher, given)
        shares = row_shares(counted(input_ids, signals))
        head, value, total = head_of(model, facts.rule), None, torch.zeros((), device=given.device)
        for size in sandwich(self.space, self._step):
            if size not in self._bodies:
                self._bodies[size] = SubModel(model.config, size)
            body = self._bodies[size]
            with projections(body.body) as own:
                states = body.states(model, given)
            with torch.autocast(given.device.type, enabled=False):
                losses = relation_losses(
                    own, taught, num_heads=self._relation_heads, softmaxed=self._softmaxed
                )
            total = total + (losses * shares).sum()
            if value is None or self._hard:
                small = Head(head.weight[:, : size.hidden], head.bias, head.rule)
                with torch.set_grad_enabled(bool(self._hard)):
                    hidden = predicting(states, input_ids.shape[1])
                    plain = self._plain.of(hidden, small, input_ids, signals)
                total = total + self._hard * plain.objective
                value = value or plain  # of the largest, which is the whole model
        assert value is not None
        return value._replace(objective=total)


@torch.no_grad()
def teacher_projections(teacher: PreTrainedModel, given: Tensor) -> list[Tensor]:
    """Q, K and V of a teacher's last layer for token ids [B, T]."""
    body: Any = teacher.base_model
    with projections(body) as found:
        body(input_ids=given, use_cache=False)
    return found


def best_sub_network(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    space: Sequence[SubNetwork],
    input_ids: Tensor,
    max_flops: float,
    relation_heads: int = 12,
) -> SubNetwork:
    """The sub-network with the least relation loss of those with at most `max_flops` a token.

    Args:
        model, teacher: in evaluation mode, on one device.
        space: as `space_of`.
        input_ids: text to compare on [B, T], BOS included.
        max_flops: of a forward pass for one token, as `ModelShape.flops_per_token`.

    Raises:
        SpecError: all are above.
    """
    length = input_ids.shape[1]
    costs = {one: shape_of(model.config, one).flops_per_token(length) for one in space}
    if min(costs.values()) > max_flops:
        raise SpecError(
            f"the smallest sub-network takes {min(costs.values()):,} FLOPs a token, more than the "
            f"{max_flops:,.0f} that are allowed"
        )
    fitting = [one for one in space if costs[one] <= max_flops]
    losses = proxy_losses(model, teacher, fitting, input_ids, relation_heads)
    return min(losses, key=lambda one: (losses[one], one))


@torch.no_grad()
def proxy_losses(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    space: Sequence[SubNetwork],
    input_ids: Tensor,
    relation_heads: int = 12,
) -> dict[SubNetwork, float]:
    """The mean relation loss of each sub-network on token ids [B, T]."""
    taught, losses = teacher_projections(teacher, input_ids), dict[SubNetwork, float]()
    for size in space:
        body = SubModel(model.config, size)
        with projections(body.body) as own:
            body.states(model, input_ids)
        losses[size] = relation_losses(own, taught, num_heads=relation_heads).mean().item()
    return losses
