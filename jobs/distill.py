"""`job: distill` as the verbs see it."""

from dataclasses import dataclass
from typing import Any

from stillhouse.distillation.spec import DistillSpec, ExpertSettings
from stillhouse.jobs.costs import parts_row, speeds_of
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.image_inputs import ImageInputs, list_images, open_images
from stillhouse.storage.artifact import Store
from stillhouse.storage.filesystem import FileInfo
from stillhouse.storage.run_record import RunRecord


def _steps(spec: DistillSpec) -> list[str]:
    """The steps of a job, in order."""
    stages = spec.method.stages
    made = ["experts", *stages] if spec.matching else ["teachers", *stages, "labels"]
    chosen = set(spec.controls) - {"full"}
    controls = ["controls"] if chosen else []
    tuned = ["tune controls"] if chosen and spec.matching else []
    judged = ["choose", *controls, *tuned, "evaluate"]
    return ["images", *made, *judged, "result"]


def _asked(spec: DistillSpec) -> dict[str, dict[str, int]]:
    """What the spec alone tells of its steps: parts, and the work in them."""
    method = spec.method
    asked: dict[str, dict[str, int]] = {name: {"parts": 1} for name in ("images", "labels")}
    if spec.matching and not (spec.experts and spec.experts.path):
        settings = spec.experts or ExpertSettings()
        asked["experts"] = {"parts": settings.count, "epochs": settings.count * settings.epochs}
    if spec.teachers:
        count = len(spec.teachers)
        asked["teachers"] = {"parts": count, "epochs": count * spec.teacher_recipe.epochs}
    iterations = getattr(method, "num_iterations", None)
    if iterations is not None:
        asked["distil"] = {"iterations": iterations}
    return asked


def list_distill(spec: DistillSpec) -> "ListedDistill":
    """See `stillhouse.jobs.kinds.list_job`."""
    return ListedDistill(spec, list_images(spec.data))


@dataclass(frozen=True, slots=True)
class ListedDistill:
    """A distil job whose files were listed."""

    spec: DistillSpec
    found: list[FileInfo]

    @property
    def files(self) -> list[list[FileInfo]]:
        """Of the images."""
        return [self.found]

    def open(self, store: Store, *, remember: bool) -> "OpenedDistill":
        """Digest the files."""
        return OpenedDistill(
            self.spec, open_images(store, self.spec, self.found, remember=remember)
        )


@dataclass(frozen=True, slots=True)
class OpenedDistill:
    """A distil job whose inputs are known by content."""

    spec: DistillSpec
    inputs: ImageInputs

    def identity(self) -> list[Any]:
        """Of the images and of given experts."""
        return self.inputs.identity()

    def walk(self, ctx: Context) -> object:
        """The whole pipeline."""
        from stillhouse.pipelines.distill import run_distill

        return run_distill(ctx, self.spec, self.inputs)

    def run(self, ctx: Context, record: RunRecord) -> dict[str, Any]:
        """The pipeline, the artifact, then the report."""
        from stillhouse.pipelines.distill import put_result, run_distill
        from stillhouse.pipelines.distill_result import distill_result
        from stillhouse.report.page import write

        made = run_distill(ctx, self.spec, self.inputs)
        committed = put_result(made)
        return write(distill_result(ctx, self.spec, made, committed, record.uri))

    def estimate(self, ctx: Context, *, complete: bool) -> dict[str, dict[str, Any]]:
        """What was walked is exact, what the spec says is counted; seconds as earlier runs took."""
        speeds, asked = speeds_of(ctx.store), _asked(self.spec)
        left = [] if complete else [name for name in _steps(self.spec) if name not in ctx.work]
        return {
            name: parts_row(ctx.work.get(name), speeds, name, **asked.get(name, {}))
            for name in [*ctx.work, *left]
        }
