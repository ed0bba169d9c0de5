"""Trained models measured on tasks: the step, its numbers, and its section of the report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import stillhouse.report.blocks as b
from stillhouse.errors import InputError, SpecError
from stillhouse.evaluation.harness import HarnessHost, HarnessTask
from stillhouse.evaluation.harness_tasks import check_task
from stillhouse.evaluation.settings import TaskEvaluation
from stillhouse.evaluation.tasks import TaskSource, harness_version
from stillhouse.pipelines.context import Context, Step, perform, run_tasks
from stillhouse.report.formatting import words
from stillhouse.storage.artifact import Manifest
from stillhouse.storage.filesystem import exists, join, list_names
from stillhouse.storage.layout import MANIFEST
from stillhouse.training.task import CHECKPOINTS, checkpoints_of

STEP = "evaluate"
_STDERR = "_stderr"
_WIDE = 4
"""Tasks that take the whole width of the page."""
_FIRST = ("acc_norm", "acc", "exact_match", "bits_per_byte", "perplexity")
"""Metrics by which a task is shown in the report: the first one that it has."""
_NOTE = (
    "One number of each task, with the harness's standard error over its rows; all metrics are in "
    "`result.json`. A guess: what an answer drawn at random is worth."
)


_Metrics: TypeAlias = dict[str, dict[str, float]]
"""By task and name."""


@dataclass(frozen=True, slots=True)
class TaskResults:
    """What was measured.

    Attributes:
        models: metrics by model, task and name.
        checkpoints: the same by step, of each model that has some.
        chances: what a guess is worth, by task with choices.
        num_rows: rows by task as the spec has it.
        cut: of these, rows that do not fit the context whole, by model and task that has some.
        unusable: rows that could not be used, by task and reason.
        receipts: names of the measurements, of which a prune keeps those that a run names.
    """

    models: dict[str, _Metrics] = field(default_factory=dict[str, _Metrics])
    checkpoints: dict[str, dict[int, _Metrics]] = field(
        default_factory=dict[str, dict[int, _Metrics]]
    )
    chances: dict[str, float] = field(default_factory=dict[str, float])
    num_rows: dict[str, int] = field(default_factory=dict[str, int])
    cut: dict[str, dict[str, int]] = field(default_factory=dict[str, dict[str, int]])
    unusable: dict[str, dict[str, int]] = field(default_factory=dict[str, dict[str, int]])
    receipts: list[str] = field(default_factory=list[str])


def check_tasks(ctx: Context, settings: TaskEvaluation, tasks: Sequence[TaskSource]) -> None:
    """Refuse tasks that nobody knows, and files without a usable row, before anything is trained.

    Raises:
        SpecError: an unknown name. InputError: rows or columns that cannot be used.
    """
    if ctx.dry:
        return
    asked = [(source, settings.num_fewshot) for source in tasks]
    for source, wrong in zip(tasks, run_tasks(ctx, check_task, asked), strict=True):
        if wrong is not None:
            error = InputError if source.kind == "rows" else SpecError
            raise error(f"`evaluate.tasks`: {wrong}")


def evaluate_models(
    ctx: Context,
    settings: TaskEvaluation,
    tasks: Sequence[TaskSource],
    models: Mapping[str, Manifest],
) -> TaskResults:
    """Every model, by what it is called, on every task; finished measurements are found."""
    compute = ctx.compute
    host = HarnessHost(compute.device, compute.gpus_of(compute.scorer), compute.threads_per_worker)
    asked = [
        (label, step, model)
        for label, model in models.items()
        for step in [*(_kept_steps(ctx, model) if settings.checkpoints else []), None]
    ]
    harness = harness_version()
    todo = [
        HarnessTask(
            model=model.fingerprint,
            step=step,
            source=source,
            num_fewshot=_num_fewshot(settings, source),
            limit=settings.limit,
            batch_size=settings.batch_size,
            bos_id=model.settings.get("tokenizer", {}).get("bos_id"),
            harness=harness,
            folder=ctx.store.path(model.kind, model.fingerprint),
        )
        for _, step, model in asked
        for source in tasks
    ]
    receipts = perform(ctx, Step(STEP, todo, host, compute.scorers, compute.scorer, unit="rows"))
    made = TaskResults(receipts=[receipt.task for receipt in receipts])
    found = iter(receipts)
    for label, step, _ in asked:
        results: _Metrics = {}
        for source in tasks:
            receipt = next(found)
            results |= receipt.info["results"]
            made.num_rows[source.name] = receipt.counts["rows"]
            if receipt.info["cut"]:
                made.cut.setdefault(label, {})[source.name] = receipt.info["cut"]
            if receipt.info["unusable"]:
                made.unusable[source.name] = receipt.info["unusable"]
            if receipt.info["chance"] is not None:
                made.chances[source.name] = receipt.info["chance"]
        if step is None:
            made.models[label] = results
        else:
            made.checkpoints.setdefault(label, {})[step] = results
    return made


def _num_fewshot(settings: TaskEvaluation, source: TaskSource) -> int | None:
    """Examples before each row; None: as the harness's task has it."""
    default = 0 if source.kind == "rows" else None
    return default if settings.num_fewshot is None else settings.num_fewshot


def _kept_steps(ctx: Context, model: Manifest) -> list[int]:
    """Steps of a model's checkpoints, but the last, which is the model."""
    folder = ctx.store.path(CHECKPOINTS, checkpoints_of(model.fingerprint))
    names = [name for name in list_names(folder) if name.isdigit()]
    whole = [int(name) for name in names if exists(join(folder, name, MANIFEST))]
    return sorted(step for step in whole if step < model.totals["num_steps"])


def evaluation_numbers(made: TaskResults) -> dict[str, Any]:
    """The object `evaluate` of `run --json`."""
    numbers: dict[str, Any] = {"models": made.models, "rows": made.num_rows}
    numbers |= {"cut": made.cut, "unusable": made.unusable}
    if made.checkpoints:
        numbers["checkpoints"] = {
            label: {str(step): results for step, results in steps.items()}
            for label, steps in made.checkpoints.items()
        }
    return numbers | {"chance": made.chances, "receipts": made.receipts}


def evaluation_section(made: TaskResults) -> b.Section:
    """A table of models and tasks, and the course of the checkpoints."""
    first = next(iter(made.models.values()))
    shown = {task: name for task, metrics in first.items() if (name := _main_metric(metrics))}
    columns = {"Model": "text", **{f"{t} {words(m)}": "decimals3" for t, m in shown.items()}}
    rows: list[list[b.Cell]] = [
        [words(label), *(_cell(results.get(task, {}), m) for task, m in shown.items())]
        for label, results in made.models.items()
    ]
    if made.chances:
        guess = [[made.chances[t], None] if t in made.chances else None for t in shown]
        rows.append(["a guess", *guess])
    blocks: list[b.Block] = [
        b.Table(
            columns,
            rows,
            "Measured by lm-evaluation-harness",
            style="short" if len(shown) < _WIDE else "full",
            terminal=True,
        )
    ]
    for label, steps in made.checkpoints.items():
        last = max(steps)
        curves = {
            f"{task} {words(metric)}": [
                [(float(step), results[task][metric]) for step, results in steps.items()]
            ]
            for task, metric in shown.items()
        }
        caption = f"Checkpoints of {words(label)} up to step {last:,}"
        blocks.append(b.Curves(caption, curves, next(iter(curves)), x_title="steps", y_title=""))
    blocks.append(b.Text(_NOTE, "note"))
    for label, tasks in made.cut.items():
        counts = ", ".join(
            f"{n:,} of {made.num_rows[task]:,} of {task}" for task, n in tasks.items()
        )
        text = f"Rows that are longer than the context of {words(label)}, cut at their beginning: "
        blocks.append(b.Text(f"{text}{counts}.", "note", terminal=True))
    for task, reasons in made.unusable.items():
        counts = "; ".join(f"{n:,}: {why}" for why, n in reasons.items())
        blocks.append(b.Text(f"Rows of {task} that could not be used: {counts}.", "note"))
    return b.Section("tasks", "What it can do", blocks)


def _main_metric(metrics: Mapping[str, float]) -> str | None:
    names = [name for name in (*_FIRST, *metrics) if name in metrics and not name.endswith(_STDERR)]
    return names[0] if names else None


def _cell(metrics: Mapping[str, float], name: str) -> list[float | None] | None:
    if name not in metrics:
        return None
    return [metrics[name], metrics.get(f"{name}{_STDERR}")]
