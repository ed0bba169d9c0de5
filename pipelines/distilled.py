"""The last step of a distil job: the artifact that is delivered, and the pictures to look at."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from stillhouse.actors.image_worker import ImageCall, ImageWork
from stillhouse.distillation.evaluate_job import LABEL_SEED
from stillhouse.distillation.methods import TrajectoryMethod
from stillhouse.distillation.pictures import REAL, Shown
from stillhouse.distillation.result_job import ResultTask, run_result
from stillhouse.distillation.spec import DistillSpec
from stillhouse.fingerprint import fingerprint
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.crew import Crew
from stillhouse.pipelines.distill import DistillRun, Point
from stillhouse.pipelines.evaluation import set_augmentation, set_protocol
from stillhouse.storage.artifact import Manifest
from stillhouse.storage.layout import LAYOUT_VERSION
from stillhouse.storage.parquet import read_table

RESULT_VERSION = 3
_SHOWN_POINTS = 6
_SHOWN_PER_CLASS = 10


@dataclass(frozen=True, slots=True)
class Pictures:
    """PNGs by point and class: `starts` the real images, `made` the chosen set, `along` the way."""

    starts: dict[int, list[bytes]]
    made: dict[int, list[bytes]]
    along: dict[int, dict[int, list[bytes]]]


def put_result(
    ctx: Context, crew: Crew, spec: DistillSpec, made: DistillRun, work: ImageWork
) -> tuple[Manifest, Pictures]:
    """The artifact of the chosen set, named by the set, its labels and the images; the pictures."""
    best = made.best
    trained_by = _trained_by(spec, made)
    name = fingerprint(
        ["distilled", RESULT_VERSION, LAYOUT_VERSION, work.images, work.zca, best.part.sha256,
         made.made.label_sha256, made.made.name, best.iteration, trained_by]
    )  # fmt: skip
    totals: dict[str, Any] = {
        "method": spec.method.name,
        "images_per_class": spec.method.images_per_class,
        "bytes": made.stored.total,
        "image_bytes": made.stored.images,
        "label_bytes": made.stored.labels,
        "learning_rate": best.learning_rate,
        "iteration": best.iteration,
        "trained_by": trained_by,
    }
    inputs = {
        "images": work.images,
        "distillation": made.made.name,
        "learned_from": list(made.made.fingerprints),
    }
    task = ResultTask(
        name, best.part.path, made.made.label_path, inputs, spec.method.model_dump(mode="json"),
        totals, _shown(made),
    )  # fmt: skip
    (done,) = crew.do("result", "distilled", [ImageCall(run_result, task)])
    rows = read_table(ctx.store.path(done.parts[1].path))
    return ctx.store.get_manifest("distilled", name), _by_point(rows, best.iteration)


def _shown(made: DistillRun) -> Shown:
    points = tuple((p.iteration, p.part.path) for p in _spread(made.points, made.best))
    return Shown(points, _SHOWN_PER_CLASS, len(made.points) == 1, made.made.starts)


def _by_point(rows: pa.Table, chosen: int) -> Pictures:
    found: dict[int, dict[int, list[bytes]]] = {}
    for row in rows.to_pylist():
        found.setdefault(row["point"], {}).setdefault(row["label"], []).append(row["png"])
    along = {point: found[point] for point in sorted(found) if point != REAL}
    return Pictures(found[min(found)], found[chosen], along)


def _trained_by(spec: DistillSpec, made: DistillRun) -> dict[str, Any]:
    """How networks were trained on the set when it was judged; labels of views need it."""
    classes = len(made.images.totals["class_names"])
    protocol = set_protocol(spec, classes, made.best.learning_rate)
    return {
        "labels": getattr(spec.method, "labels", "logits" if _soft(spec) else "classes"),
        "recipe": protocol.recipe.model_dump(mode="json"),
        "augmentation": list(set_augmentation(spec)),
        "temperature": protocol.temperature,
        "view_seed": LABEL_SEED if made.made.label_path is not None else None,
    }


def _soft(spec: DistillSpec) -> bool:
    return isinstance(spec.method, TrajectoryMethod) and spec.method.soft_labels


def _spread(points: Sequence[Point], best: Point) -> list[Point]:
    """The first, the chosen and the last point, and some evenly between."""
    count = min(_SHOWN_POINTS, len(points))
    chosen = {round(i * (len(points) - 1) / max(1, count - 1)) for i in range(count)}
    chosen.add(points.index(best))
    return [points[i] for i in sorted(chosen)]
