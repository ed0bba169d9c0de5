"""Distiller (He et al. 2021, arXiv 2109.11105): a student imitates a teacher's logits and layers.

    objective = logits_weight * L(logits) + layers_weight * sum over pairs l(student i, teacher j)
                + hard_weight * CE

    L    `mse`: mean ((s - t) / T)^2; `ce`: -sum p_t log p_s at temperature T. There is no factor
         T^2, so that T changes the weight of the term too.
    l    `mse`, `cos`, `ce` (softmax over the width) at every position; `pkd` and `mi` of one state
         a sequence. Entry 0 of the layers is the embeddings' output.

Ours: the authors read position 0, which attends to nothing in a causal model; `pkd` and `mi` take
the mean state of a sequence. The critic of `mi` scores sequences against each other: a product of
two small networks, one for each student and each teacher layer. The authors' code compares
positions of pooled sequences instead. `emd` finds its transport plan by Sinkhorn's iterations.

What couples sequences (`mi`, `emd`, `mixup`) does so within groups of `group_rows` consecutive rows
of the global batch: neither workers nor micro-batches change the loss.
"""

import math
import zlib
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stillhouse.errors import SpecError
from stillhouse.models.device import initialised
from stillhouse.models.head import Head, head_of, logit_rule, with_bos
from stillhouse.text.pieces import LOSS_MASK
from stillhouse.training.objectives import LossValue, ObjectiveFacts
from stillhouse.training.objectives.chunked import ChunkLosses, chunked_losses, token_weights
from stillhouse.training.objectives.cross_entropy import CrossEntropy
from stillhouse.training.objectives.distil import soft_cross_entropy
from stillhouse.training.objectives.layer_losses import STATE_LOSSES, logit_mse
from stillhouse.training.objectives.layer_term import LayerTerm
from stillhouse.training.objectives.teaching import counted, layer_states, only_teacher

_BETA = 0.4  # both parameters of mixup's distribution


class Distiller(nn.Module):
    """Its parameters, a map between widths and the critics of `mi`, are trained with the student.

    Args:
        facts: of the training.
        logits, layers: the losses L and l.
        logits_weight, layers_weight, hard_weight: of the three terms; one of 0 is left out.
        mapping: `skip` and `last` pair every student layer with one teacher layer; `emd` moves all
            student layers to all teacher layers at the least cost.
        layer_weights: shares of the layers in `emd`: equal, or learned.
        temperature: T of the logits.
        alpha: of `mi`, in [0, 1].
        group_rows: sequences that are compared with each other.
        mixup: train on mixtures of pairs of sequences' embeddings, weighed by Beta(0.4, 0.4). The
            reported training loss is then that of the mixtures.
        seed: of the parameters and of mixup.

    Raises:
        SpecError: a setting out of range, or a teacher with fewer layers than `last` needs.
    """

    needs_models: ClassVar[bool] = True
    signals: ClassVar[tuple[str, ...]] = (LOSS_MASK,)

    def __init__(
        self,
        facts: ObjectiveFacts,
        logits: Literal["mse", "ce"] = "mse",
        layers: Literal["mse", "cos", "pkd", "ce", "mi"] = "mse",
        logits_weight: float = 1.0,
        layers_weight: float = 1.0,
        hard_weight: float = 0.0,
        mapping: Literal["skip", "last", "emd"] = "skip",
        layer_weights: Literal["uniform", "learned"] = "uniform",
        temperature: float = 1.0,
        alpha: float = 0.9,
        group_rows: int = 8,
        mixup: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._facts, self._seed, self._step = facts, seed, 0
        teacher = only_teacher(facts, "distiller")
        self._plain = CrossEntropy(facts, 0.0)
        self._logits = logits
        self._weights = logits_weight, layers_weight, hard_weight
        self._temperature, self._mixup = temperature, mixup
        for name, value, known in (
            ("logits", logits, ("mse", "ce")),
            ("layers", layers, (*STATE_LOSSES, "pkd", "mi")),
            ("mapping", mapping, ("skip", "last", "emd")),
            ("layer_weights", layer_weights, ("uniform", "learned")),
        ):
            _check(name, value, value in known, f"one of {', '.join(known)}")
        _check("temperature", temperature, temperature > 0, "above 0")
        _check("alpha", alpha, 0 <= alpha <= 1, "between 0 and 1")
        _check("group_rows", group_rows, group_rows >= 2, "2 or more")
        sizes = [config.get_text_config() for config in facts.configs]
        depths = [size.num_hidden_layers for size in sizes]
        widths = [size.hidden_size for size in sizes]
        vocab = min(facts.vocab_size or math.inf, *(size.vocab_size for size in sizes))
        _check("logits", logits, logits == "mse" or vocab > 1, "mse for a single logit")
        short = mapping == "last" and depths[1] < depths[0]
        _check("mapping", mapping, not short, f"skip or emd: the teacher has {depths[1]} layers")
        self._vocab, self._rule = int(vocab), logit_rule(teacher)
        couples = mixup or (layers_weight and (layers == "mi" or mapping == "emd"))
        self.rows_together = group_rows if couples else 1
        if layers_weight:
            self.layers = initialised(
                lambda: LayerTerm(
                    layers,
                    mapping,
                    depths,
                    widths,
                    alpha=alpha,
                    learned=layer_weights == "learned",
                    rows=self.rows_together,
                ),
                seed,
            )

    @property
    def _teacher(self) -> PreTrainedModel:
        """Not an attribute, which would make it a part of this module."""
        return self._facts.models[0]

    def at_step(self, step: int, num_steps: int) -> None:
        """See `Objective`."""
        self._step = step

    def forward(
        self, model: PreTrainedModel, input_ids: Tensor, signals: Mapping[str, Tensor]
    ) -> LossValue:
        """See `Objective`. Without gradients, as on held-out sequences, the plain loss."""
        if not torch.is_grad_enabled():
            return self._plain(model, input_ids, signals)
        given = with_bos(input_ids, self._facts.bos_id)
        mixture = self._draw(input_ids) if self._mixup else None
        inputs = [self._inputs(one, given, mixture) for one in (model, self._teacher)]
        student = layer_states(model, input_ids.shape[1], **inputs[0])
        with torch.no_grad():
            teacher = layer_states(self._teacher, input_ids.shape[1], **inputs[1])
        value = self._of_logits(model, student[-1], teacher[-1], input_ids, signals, mixture)
        if not self._weights[1]:
            return value
        with torch.autocast(input_ids.device.type, enabled=False):
            layers = self.layers(student, teacher, counted(input_ids, signals))
        return value._replace(objective=value.objective + self._weights[1] * layers)

    def _inputs(
        self, model: PreTrainedModel, given: Tensor, mixture: tuple[Tensor, Tensor] | None
    ) -> dict[str, Tensor]:
        if mixture is None:
            return {"input_ids": given}
        partner, share = mixture
        embed: Any = model.get_input_embeddings()
        states = embed(given)
        share = share[:, None, None].to(states.dtype)
        return {"inputs_embeds": share * states + (1 - share) * states[partner]}

    def _draw(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """A partner [B] within its group and a share [B] for each row.

        They follow from seed, step and the group's tokens, so that they are the same wherever the
        group is.
        """
        size, partners, shares = self.rows_together, list[Any](), list[Any]()
        for start, group in enumerate(input_ids.cpu().split(size)):
            tokens = zlib.crc32(group.numpy().tobytes())
            draws = np.random.default_rng([self._seed, self._step, tokens])
            partners.append(start * size + draws.permutation(len(group)))
            shares.append(draws.beta(_BETA, _BETA, len(group)))
        partner, share = (torch.from_numpy(np.concatenate(x)) for x in (partners, shares))
        return partner.to(input_ids.device), share.float().to(input_ids.device)

    def _of_logits(
        self,
        model: PreTrainedModel,
        student: Tensor,
        teacher: Tensor,
        input_ids: Tensor,
        signals: Mapping[str, Tensor],
        mixture: tuple[Tensor, Tensor] | None,
    ) -> LossValue:
        """The first and the last term, in chunks of positions."""
        soft, _, hard = self._weights
        targets = input_ids[:, 1:]
        columns = [targets.flatten(), teacher.flatten(0, 1)]
        if mixture is not None:
            partner, share = mixture
            columns += [targets[partner].flatten(), share.repeat_interleave(targets.shape[1])]
        known = Head(*head_of(self._teacher, self._rule))

        def losses(logits: Tensor, target: Tensor, states: Tensor, *mixed: Tensor) -> ChunkLosses:
            def nll_of(ids: Tensor) -> Tensor:
                return logits.logsumexp(1) - logits.gather(1, ids[:, None])[:, 0]

            nll = nll_of(target)
            if mixed:
                nll = mixed[1] * nll + (1 - mixed[1]) * nll_of(mixed[0])
            objective = hard * nll
            if soft:
                with torch.no_grad():
                    taught = known.logits(states)[:, : self._vocab]
                loss = logit_mse if self._logits == "mse" else soft_cross_entropy
                objective = objective + soft * loss(
                    logits[:, : self._vocab], taught, self._temperature
                )
            return ChunkLosses(objective, nll)

        weights = token_weights(signals.get(LOSS_MASK))
        head = head_of(model, self._facts.rule)
        found = chunked_losses(student.flatten(0, 1), head, losses, columns, weights)
        token_nll = None if mixture is not None else found[2].view_as(targets)
        return LossValue(found[0], found[1], token_nll)


def _check(name: str, value: object, fits: bool, wanted: str) -> None:
    if not fits:
        raise SpecError(f"`train.objective.{name}: {value}`: use {wanted}")
