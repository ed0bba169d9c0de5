"""Teachers of a training: checked, put into the store, and their signals of its data made once."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from stillhouse.custom_code import CustomCode
from stillhouse.errors import InputError, SpecError
from stillhouse.pipelines.context import Context, Step, perform, run_tasks
from stillhouse.pipelines.given import ModelRef
from stillhouse.pipelines.tokens import TokenizerRef
from stillhouse.spec import ScoringSettings
from stillhouse.training.named_objective import NamedObjective
from stillhouse.training.signals import SignalPart, SignalTask, TeacherHost
from stillhouse.training.spec import ObjectiveSettings, TrainSpec
from stillhouse.training.task import TokenSet

SIGNALS = "teacher signals"
"""The step's name."""


def teacher_hosts(
    spec: TrainSpec, models: Sequence[ModelRef], tokenizer: TokenizerRef
) -> tuple[TeacherHost, ...]:
    """The teachers of a training's objective.

    Raises:
        SpecError: more tokens are to be kept than the vocabulary has.
    """
    objective, compute = spec.train.objective, spec.compute
    if objective.kept_signals and objective.top_k > tokenizer.vocab_size:
        raise SpecError(
            f"`train.objective.top_k: {objective.top_k}`: the tokenizer has only "
            f"{tokenizer.vocab_size} tokens"
        )
    return tuple(
        TeacherHost(
            digest=model.fingerprint,
            vocab_size=tokenizer.vocab_size,
            bos_id=tokenizer.bos_id,
            scoring=ScoringSettings(dtype=spec.train.dtype),
            folder=model.folder,
            device=compute.device,
            gpus=compute.gpus_of(compute.scorer),
            threads=compute.threads_per_worker,
        )
        for model in models
    )


def stored_signals(
    ctx: Context,
    objective: ObjectiveSettings,
    code: CustomCode | None,
    teachers: Sequence[TeacherHost],
    models: Sequence[ModelRef],
    sets: Sequence[TokenSet],
) -> list[TokenSet]:
    """The data sets with every teacher's signals, made where they are not in the store.

    Raises:
        SpecError: settings that the objective does not take.
        InputError: a teacher that gives NaN.
    """
    if teachers and not ctx.dry:
        next(run_tasks(ctx, partial(_check, code), [objective]))
    made: list[list[tuple[tuple[SignalPart, ...], ...]]] = [[] for _ in sets]
    for number, (teacher, model) in enumerate(zip(teachers, models, strict=True)):
        tasks = [
            SignalTask(teacher, objective.signal_settings, digest, rows, one.sequence_length, uri)
            for one in sets
            for uri, rows, digest in zip(one.uris, one.rows, one.digests, strict=True)
        ]
        compute = ctx.compute
        try:
            receipts = perform(ctx, Step(SIGNALS, tasks, teacher, compute.scorers, compute.scorer))
        except InputError as error:
            raise InputError(f"`train.objective.teachers.{number}`: {error}") from error
        work = ctx.work[SIGNALS]
        tokens = sum(receipt.counts["tokens"] for receipt in receipts)
        work.tokens += tokens
        work.flops += float(model.shape.flops_per_token(sets[0].sequence_length)) * tokens
        parts = [
            tuple(
                SignalPart(ctx.store.path(part.path), rows)
                for part, rows in zip(receipt.parts, task.part_rows, strict=True)
            )
            for task, receipt in zip(tasks, receipts, strict=True)
        ]
        for i, one in enumerate(sets):
            made[i].append(tuple(parts[: len(one.uris)]))
            parts = parts[len(one.uris) :]
    return [replace(one, signals=tuple(found)) for one, found in zip(sets, made, strict=True)]


def check_objective(ctx: Context, objective: NamedObjective, code: CustomCode | None) -> None:
    """Check on a worker that an objective takes its settings, before anything is made for it.

    Raises:
        SpecError: it does not.
    """
    if objective.options and not ctx.dry:
        next(run_tasks(ctx, partial(_check_options, code), [objective]))


def _check_options(code: CustomCode | None, objective: NamedObjective) -> bool:
    from stillhouse.training.objectives import check_options

    check_options(objective, code)
    return True


def _check(code: CustomCode | None, settings: ObjectiveSettings) -> bool:
    """Make the objective once, on a worker, before teachers score anything for it."""
    from stillhouse.models.head import PLAIN
    from stillhouse.training.objectives import ObjectiveFacts, make_objective

    make_objective(settings, code, ObjectiveFacts(PLAIN))
    return True
