"""`job: distill`: its inputs, its pipeline, and what its steps would cost."""

from typing import Any

from stillhouse.distillation.spec import DistillSpec, ExpertSettings
from stillhouse.jobs.kinds import Job, Speeds, parts_row
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.given import resolved
from stillhouse.pipelines.image_inputs import ImageInputs, list_images, open_images
from stillhouse.report.blocks import Result
from stillhouse.storage.artifact import Store
from stillhouse.storage.filesystem import absolute_uri


class DistillationJob(Job):
    """A distil job."""

    inputs: ImageInputs

    def __init__(self, spec: DistillSpec) -> None:
        self.spec = resolved(spec, Store(absolute_uri(spec.store)))
        self.files = [list_images(spec.data)]

    def open(self, store: Store, *, remember: bool) -> "DistillationJob":
        self.inputs = open_images(store, self.spec, self.files[0], remember=remember)
        return self

    def identity(self) -> list[Any]:
        return self.inputs.identity()

    def walk(self, ctx: Context, run_uri: str = "") -> Any:
        from stillhouse.pipelines.distill import run_distill

        return run_distill(ctx, self.spec, self.inputs)

    def result(self, ctx: Context, made: Any, run_uri: str) -> Result:
        from stillhouse.pipelines.distill import put_result
        from stillhouse.pipelines.distill_result import distill_result

        return distill_result(ctx, self.spec, made, put_result(made), run_uri)

    def estimate(
        self, ctx: Context, speeds: Speeds, *, complete: bool
    ) -> dict[str, dict[str, Any]]:
        """What was walked is exact; of the rest, what the spec alone says is counted."""
        amounts = _amounts(self.spec)
        left = [] if complete else [name for name in _steps(self.spec) if name not in ctx.work]
        return {
            name: parts_row(ctx.work.get(name), speeds, name, **amounts.get(name, {}))
            for name in [*ctx.work, *left]
        }


def _steps(spec: DistillSpec) -> list[str]:
    """The steps of a job, in order."""
    stages = spec.method.stages
    made = ["experts", *stages]
    if not spec.matching:
        given = ["given teachers"] if spec.given_teachers else []
        trained = ["teachers"] if spec.trained_teachers else []
        made = [*given, *trained, *stages, "labels"]
    sampled = set(spec.controls) - {"full"}
    controls = ["controls"] if sampled else []
    tuned = ["tune controls"] if sampled and spec.matching else []
    return ["images", *made, "choose", *controls, *tuned, "evaluate", "result"]


def _amounts(spec: DistillSpec) -> dict[str, dict[str, int]]:
    """By step: parts and the work in them, as far as the spec alone says."""
    amounts: dict[str, dict[str, int]] = {name: {"parts": 1} for name in ("images", "labels")}
    if spec.matching and not (spec.experts and spec.experts.path):
        settings = spec.experts or ExpertSettings()
        amounts["experts"] = {"parts": settings.count, "epochs": settings.count * settings.epochs}
    if spec.given_teachers:
        amounts["given teachers"] = {"parts": len(spec.given_teachers)}
    if spec.trained_teachers:
        count = len(spec.trained_teachers)
        amounts["teachers"] = {"parts": count, "epochs": count * spec.teacher_recipe.epochs}
    iterations = getattr(spec.method, "num_iterations", None)
    if iterations is not None:
        amounts["distil"] = {"iterations": iterations}
    return amounts
