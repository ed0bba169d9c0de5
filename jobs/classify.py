"""`job: train` with `task: classify`: its inputs, its pipeline, and what its steps would cost."""

from typing import Any

from stillhouse.classification.samples import list_rows
from stillhouse.classification.spec import ClassifySpec
from stillhouse.classification.unlabelled import UNLABELLED
from stillhouse.distillation.image_files import list_source
from stillhouse.jobs.kinds import Job, Speeds, parts_row
from stillhouse.pipelines.classify_data import ClassifyInputs, open_classify
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.given import resolved
from stillhouse.pipelines.image_inputs import list_images
from stillhouse.pipelines.teachers import SIGNALS
from stillhouse.report.blocks import Result
from stillhouse.storage.artifact import Store
from stillhouse.storage.filesystem import absolute_uri


class ClassifyJob(Job):
    """A training of a classifier."""

    inputs: ClassifyInputs

    def __init__(self, spec: ClassifySpec) -> None:
        self.spec = resolved(spec, Store(absolute_uri(spec.store)))
        others = spec.unlabelled
        listed = list_source if spec.data.kind == "images" else list_rows
        self.files = [
            list_images(spec.data, listed),
            list_source(others.path) if others else [],
        ]

    def open(self, store: Store, *, remember: bool) -> "ClassifyJob":
        self.inputs = open_classify(store, self.spec, *self.files, remember=remember)
        return self

    def identity(self) -> list[Any]:
        return self.inputs.identity()

    def walk(self, ctx: Context, run_uri: str = "") -> Any:
        from stillhouse.pipelines.classify import run_classify

        return run_classify(ctx, self.spec, self.inputs)

    def result(self, ctx: Context, made: Any, run_uri: str) -> Result:
        from stillhouse.pipelines.classify_result import classify_result

        return classify_result(ctx, self.spec, made, run_uri)

    def estimate(
        self, ctx: Context, speeds: Speeds, *, complete: bool
    ) -> dict[str, dict[str, Any]]:
        """What was walked is exact; of the rest, what the spec alone says is counted."""
        teachers = len(self.inputs.teachers)
        parts = {"images": 1} | ({UNLABELLED: 1} if self.spec.unlabelled else {})
        parts |= ({SIGNALS: teachers} if self.inputs.stored else {}) | {"train": 1}
        left = {} if complete else {n: count for n, count in parts.items() if n not in ctx.work}
        rows = {name: parts_row(work, speeds, name) for name, work in ctx.work.items()}
        return rows | {n: parts_row(None, speeds, n, count) for n, count in left.items()}
