"""What a training minimises: an objective is one class, ours or a user's, named in the spec.

    train.objective: {name: cross_entropy, z_loss: 1e-4}        # the default
    train.objective: {name: "my_package.losses:Focal", gamma: 2}

It is made once in every worker, as `Class(facts, **settings)`, and called for every micro-batch. A
class that is not ours comes from an installed package, or from the folder that the job is run in:
then its code is sent to the workers, and is part of the model's name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from stillhouse.custom_code import CustomCode, import_code
from stillhouse.errors import SpecError
from stillhouse.models.head import LogitRule, head_of, predicting, with_bos
from stillhouse.training.spec import OBJECTIVES, ObjectiveSettings


class LossValue(NamedTuple):
    """What a step minimises, and the mean NLL in nats that is reported; both scalars.

    Both are means over the tokens that count: the T-1 predicted ones of each sequence, or those of
    them that the signal `loss_mask` marks. Where there are none they are 0. The trainer weighs the
    micro-batches of a step by these numbers of tokens.

    `token_nll` float32 [B, T-1], where the objective has it, is what losses by source and on
    held-out sequences are made of; column t-1 belongs to position t.
    """

    objective: Tensor
    nll: Tensor
    token_nll: Tensor | None = None


@dataclass(frozen=True, slots=True)
class ObjectiveFacts:
    """What an objective is told of the training when it is made.

    Attributes:
        rule: what the architecture does to its logits.
        bos_id: stands before every sequence, for the model alone.
        compiled: whether layers and losses are compiled.
    """

    rule: LogitRule
    bos_id: int | None = None
    compiled: bool = False

    def hidden(self, model: PreTrainedModel, input_ids: Tensor) -> Tensor:
        """Hidden states [B * (T-1), H] that predict the tokens 1 .. T-1 of input_ids [B, T]."""
        body: Any = model.base_model
        given = with_bos(input_ids, self.bos_id)
        states = body(input_ids=given, use_cache=False).last_hidden_state
        return predicting(states, input_ids.shape[1])

    def logits(self, model: PreTrainedModel, input_ids: Tensor) -> Tensor:
        """Logits float32 [B, T-1, V] of the tokens 1 .. T-1 of input_ids [B, T]; all at once."""
        hidden = self.hidden(model, input_ids)
        return head_of(model, self.rule).logits(hidden).view(len(input_ids), -1, _width(model))


def _width(model: PreTrainedModel) -> int:
    embeddings: Any = model.get_output_embeddings()
    return embeddings.weight.shape[0]


class Objective(Protocol):
    """What a class has to have to be an objective; it is made as `Class(facts, **settings)`."""

    def __call__(
        self, model: PreTrainedModel, input_ids: Tensor, signals: Mapping[str, Tensor]
    ) -> LossValue:
        """The loss of a micro-batch, with gradients to the model's parameters.

        Called under `torch.no_grad` too, for held-out sequences, without signals.

        Args:
            model: a causal language model on its device; under autocast where a dtype is set.
            input_ids: int64 [B, T], without padding and without BOS.
            signals: the columns that the class names in `signals`, which all parts have to have:
                float32 [B, T] or [B] on the same device. `loss_mask` [B, T] may be missing: then
                all tokens count.
        """
        ...


def make_objective(
    settings: ObjectiveSettings, code: CustomCode | None, facts: ObjectiveFacts
) -> Objective:
    """The objective of a spec; `code` as of `objective_class`.

    Raises:
        SpecError: no such module or class, or settings that it does not take.
    """
    kind = objective_class(settings.name, code)
    try:
        return kind(facts, **settings.own())
    except TypeError as error:
        raise SpecError(f"`train.objective: {settings.name}`: {error}") from error


def objective_class(name: str, code: CustomCode | None = None) -> Any:
    """The class of a name in `OBJECTIVES`, or of `module:Class`, from `code` where it is given.

    Raises:
        SpecError: it cannot be imported.
    """
    module, _, kind = OBJECTIVES.get(name, name).partition(":")
    try:
        found = import_module(module) if code is None else import_code(code, module)
        return getattr(found, kind)
    except (ImportError, AttributeError) as error:
        raise SpecError(
            f"`train.objective: {name}` cannot be imported by a worker: {error}. Install its "
            "package where workers run"
        ) from error


def signals_of(settings: ObjectiveSettings, code: CustomCode | None = None) -> Sequence[str]:
    """The columns that an objective asks for, by the attribute `signals` of its class."""
    return getattr(objective_class(settings.name, code), "signals", ())
