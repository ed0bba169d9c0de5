"""What a training minimises: an objective is one class, ours or a user's, named in the spec.

    train.objective: {name: cross_entropy, z_loss: 1e-4}        # the default
    train.objective: {name: "my_package.losses:Focal", gamma: 2}

It is made once in every worker, as `Class(facts, **settings)`, and called for every micro-batch. A
user's class comes from an installed package, or from the folder that the job is run in: then its
code is sent to the workers, and is part of the model's name.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from inspect import signature
from typing import Any, NamedTuple, Protocol

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from stillhouse.custom_code import CustomCode, import_code
from stillhouse.errors import SpecError
from stillhouse.models.head import LogitRule, head_of, predicting, with_bos
from stillhouse.training.group import WorkerGroup
from stillhouse.training.named_objective import NamedObjective
from stillhouse.training.spec import ObjectiveSettings


class LossValue(NamedTuple):
    """The loss to minimise, and the mean NLL in nats that is reported; both scalars.

    Both are means over the tokens that count: the T-1 predicted ones of each sequence, or those of
    them that the signal `loss_mask` marks; 0 if there are none. The trainer weighs the
    micro-batches of a step by these numbers of tokens.

    `token_nll` float32 [B, T-1], column t-1 for position t, is needed for losses by source and on
    held-out sequences; None if the objective cannot give it.

    The gradients of `second` are summed apart; the objective's `join` makes one of the two.
    """

    objective: Tensor
    nll: Tensor
    token_nll: Tensor | None = None
    second: Tensor | None = None


@dataclass(frozen=True, slots=True)
class ObjectiveFacts:
    """What an objective is made with.

    Attributes:
        rule: of the architecture's logits.
        bos_id: put before every sequence, for the model only.
        compiled: whether layers and losses are compiled.
        teachers: the share of each teacher, adding up to 1; its signals are the columns
            `ids.<i>`, `log_probs.<i>` and `tails.<i>` (`stillhouse.training.signals`).
        temperatures: of the columns of tails.
        group: the workers of the training.
        models: the teachers themselves, of objectives with `needs_models`: on the device, in
            evaluation mode, without gradients.
        config: of the model that is trained.
        vocab_size: of the tokenizer; padding of a model's vocabulary is not counted.
        mask_id: of a masked language model: the token that hides others. `rule`, `hidden` and
            `logits` are those of causal models only.
    """

    rule: LogitRule
    bos_id: int | None = None
    compiled: bool = False
    teachers: tuple[float, ...] = ()
    temperatures: tuple[float, ...] = (1.0,)
    group: WorkerGroup = field(default_factory=WorkerGroup)
    models: tuple[PreTrainedModel, ...] = ()
    config: PreTrainedConfig | None = None
    vocab_size: int | None = None
    mask_id: int | None = None

    @property
    def configs(self) -> list[Any]:
        """Of the language model that is trained, then of its teachers."""
        found = [self.config, *(model.config for model in self.models)]
        return [one.get_text_config() for one in found if one is not None]

    def hidden(self, model: PreTrainedModel, input_ids: Tensor) -> Tensor:
        """Hidden states [B * (T-1), H] that predict tokens 1 .. T-1 of input_ids [B, T]."""
        body: Any = model.base_model
        given = with_bos(input_ids, self.bos_id)
        states = body(input_ids=given, use_cache=False).last_hidden_state
        return predicting(states, input_ids.shape[1])

    def logits(self, model: PreTrainedModel, input_ids: Tensor) -> Tensor:
        """Logits float32 [B, T-1, V] of tokens 1 .. T-1 of input_ids [B, T], all in memory."""
        logits = head_of(model, self.rule).logits(self.hidden(model, input_ids))
        return logits.view(len(input_ids), -1, logits.shape[1])


class Objective(Protocol):
    """An objective; made as `Class(facts, **settings)`.

    If it is a `torch.nn.Module`, its parameters are trained with the model's and kept in
    checkpoints, not with the model. Further members are asked for where they exist:

        signals: Sequence[str]          columns of the data that it reads
        hiding: Hiding | None           of masked language models: it hides tokens of every batch
                                        (`stillhouse.training.hiding`), which become the tokens
                                        that count
        needs_models: bool              it gets its teachers' models, not their signals
        rows_together: int              consecutive rows that have to enter one forward pass
        at_step(step, num_steps)        before every step, on every worker
        survey(model, inputs, signals)  [b, m] of every row, before the step and without gradients;
        learn(values)                   gets those of the whole global batch [B, m]
        join(first, second)             the gradients to use, from those of `LossValue.objective`
                                        and `second`: lists over all trained parameters, summed
                                        over the workers
    """

    def __call__(
        self, model: PreTrainedModel, input_ids: Tensor, signals: Mapping[str, Tensor]
    ) -> LossValue:
        """The loss of a micro-batch, differentiable by the model's parameters.

        Also called under `torch.no_grad`, for held-out sequences, without signals.

        Args:
            model: a language model on its device; under autocast if a dtype is set.
            input_ids: int64 [B, T], without padding and without BOS.
            signals: the columns that the class lists in `signals`, which all parts must have, and
                those of teachers: [B] or [B, m] in the column's type on the same device.
                `loss_mask` float32 [B, T] may be missing: then all tokens count.
        """
        ...


def make_objective(
    settings: ObjectiveSettings, code: CustomCode | None, facts: ObjectiveFacts
) -> Objective:
    """The objective of a spec.

    Raises:
        SpecError: no such module or class, or settings that it does not take.
    """
    kind = objective_class(settings.place, code)
    if getattr(kind, "needs_models", False) and not settings.runs_teachers:
        raise SpecError(
            f"`train.objective: {settings.name}` has `needs_models`: set `signals: none` too, "
            "so that its teachers run in the training workers"
        )
    shares = teacher_shares([teacher.weight for teacher in settings.teachers])
    facts = replace(facts, teachers=shares, temperatures=tuple(settings.temperatures))
    with refused_settings(settings.name):
        return kind(facts, **settings.options)


def teacher_shares(weights: Sequence[float]) -> tuple[float, ...]:
    """Shares of teachers, which add up to 1."""
    return tuple(weight / sum(weights) for weight in weights)


@contextmanager
def refused_settings(name: str) -> Generator[None]:
    """Settings that the class of an objective does not take become a `SpecError`."""
    try:
        yield
    except TypeError as error:
        raise SpecError(f"`train.objective: {name}`: {error}") from error


def check_options(settings: NamedObjective, code: CustomCode | None) -> None:
    """Check that the class of an objective takes its settings, by its signature.

    Raises:
        SpecError: no such module or class, or it takes others.
    """
    with refused_settings(settings.name):
        signature(objective_class(settings.place, code)).bind(None, **settings.options)


def signals_of(settings: ObjectiveSettings, code: CustomCode | None = None) -> Sequence[str]:
    """The columns that an objective reads: the attribute `signals` of its class."""
    kind = objective_class(settings.place, code)
    return getattr(kind, "signals", ())


def objective_class(name: str, code: CustomCode | None) -> Any:
    """The class `module:Class`, from `code` if it is sent along.

    Raises:
        SpecError: no such module or class.
    """
    module, _, kind = name.partition(":")
    try:
        imported = import_module(module) if code is None else import_code(code, module)
        return getattr(imported, kind)
    except (ImportError, AttributeError) as error:
        raise SpecError(
            f"`train.objective: {name}` cannot be imported by a worker: {error}. Install its "
            "package where workers run"
        ) from error
