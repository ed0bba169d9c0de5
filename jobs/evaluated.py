"""A job whose trained models are measured on the tasks of `evaluate` afterwards."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from stillhouse.evaluation.settings import TaskEvaluation
from stillhouse.evaluation.tasks import TaskSource, harness_version, list_tasks, open_tasks
from stillhouse.jobs.kinds import Job, Speeds, parts_row
from stillhouse.pipelines.context import Context
from stillhouse.report.blocks import Result
from stillhouse.storage.artifact import Store


class EvaluatedJob(Job):
    """Another job, and then its models on tasks."""

    tasks: Sequence[TaskSource] = ()

    def __init__(self, job: Job, settings: TaskEvaluation) -> None:
        self._job, self._settings = job, settings
        self._listed = list_tasks(settings)
        self.files = [*job.files, *(list(one.files) for one in self._listed)]

    def open(self, store: Store, *, remember: bool) -> "EvaluatedJob":
        self._job.open(store, remember=remember)
        self.tasks = open_tasks(store, self._listed, remember=remember)
        return self

    def identity(self) -> list[Any]:
        tasks = [[one.name, one.content, one.digests] for one in self.tasks]
        return [*self._job.identity(), tasks, harness_version()]

    def walk(self, ctx: Context, run_uri: str = "") -> Any:
        from stillhouse.pipelines.task_evaluation import check_tasks, evaluate_models

        check_tasks(ctx, self._settings, self.tasks)
        made = self._job.walk(ctx, run_uri)
        models = self._job.models(made)
        return made, evaluate_models(ctx, self._settings, self.tasks, models)

    def result(self, ctx: Context, made: Any, run_uri: str) -> Result:
        from stillhouse.pipelines.task_evaluation import evaluation_numbers, evaluation_section

        trained, measured = made
        result = self._job.result(ctx, trained, run_uri)
        at = next(i for i, section in enumerate(result.sections) if section.name == "health") + 1
        sections = [*result.sections]
        sections.insert(at, evaluation_section(measured))
        numbers = {**result.numbers, "evaluate": evaluation_numbers(measured)}
        return replace(result, numbers=numbers, sections=sections)

    def estimate(
        self, ctx: Context, speeds: Speeds, *, complete: bool
    ) -> dict[str, dict[str, Any]]:
        from stillhouse.pipelines.task_evaluation import STEP

        row = parts_row(ctx.work.get(STEP), speeds, STEP)
        return self._job.estimate(ctx, speeds, complete=complete) | {STEP: row}
