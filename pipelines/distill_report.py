"""From a finished distil job to the data of its report."""

from base64 import b64encode
from collections.abc import Sequence
from importlib.metadata import version

from stillhouse.distillation.matching import TrajectoryMethod
from stillhouse.distillation.method import Method
from stillhouse.distillation.prepared import IMAGES
from stillhouse.distillation.spec import DistillSpec
from stillhouse.distillation.tasks import DEAD_LETTERS
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.distill import DistillRun, Pictures, Point
from stillhouse.pipelines.evaluation import Tested
from stillhouse.report.data import Curve, HealthWarning
from stillhouse.report.distill import (
    MAIN,
    ClassRow,
    DistillReport,
    OtherSet,
    SetRow,
    Stage,
    StepRow,
    smoothed,
)
from stillhouse.storage.artifact import Manifest, load_manifest
from stillhouse.storage.run_record import now

_LIBRARIES = ("stillhouse", "ray", "torch", "pyarrow")
_MAX_CLASSES = 100


def _judged_by(spec: DistillSpec, made: DistillRun) -> str:
    """How networks were trained on the set."""
    classes = len(made.images.totals["class_names"])
    recipe = spec.protocol(classes, made.best.learning_rate).recipe
    return f"{spec.protocol_name}, {recipe.epochs} epochs"


def distill_report(
    ctx: Context,
    spec: DistillSpec,
    made: DistillRun,
    pictures: Pictures,
    run_uri: str,
    others: list[OtherSet],
) -> DistillReport:
    """Numbers and pictures of a run, and the sets that `others` made of its images."""
    totals = made.images.totals
    names: list[str] = totals["class_names"]
    first = next(iter(made.tests.values()))
    main = _row(
        printed_name(spec.method.name),
        spec.method.images_per_class,
        made.stored.total,
        first,
        max(point.seconds for point in made.points),
    )
    controls = [
        _row(c.name.replace("_", " "), c.images_per_class, c.num_bytes, c.tested, None)
        for c in made.controls
    ]
    return DistillReport(
        title=spec.name or f"{main.name} on {spec.data.dataset or spec.data.path}",
        created=now(),
        run_uri=run_uri,
        method=spec.method.name,
        network=", ".join(n.label for n in spec.teachers or [spec.network]),
        images_per_class=spec.method.images_per_class,
        num_classes=len(names),
        num_train=made.images.parts[0].num_rows,
        image_side=totals["shape"][1],
        others=others,
        judged_by=_judged_by(spec, made),
        began=len(made.points) > 1 or bool(made.made.starts),
        image_bytes=made.stored.images,
        label_bytes=made.stored.labels,
        learning_rate=made.best.learning_rate,
        iteration=made.best.iteration,
        validation=list(made.best.validation),
        rows=[main, *controls],
        networks=[
            _row(name, spec.method.images_per_class, made.stored.total, tested, None)
            for name, tested in made.tests.items()
        ],
        classes=_classes(names, pictures),
        stages=[
            Stage(point, [_text(images[0]) for _, images in sorted(by_class.items())[:10]])
            for point, by_class in pictures.along.items()
        ],
        losses=_losses(made),
        accuracy=_accuracy(made),
        experts=[
            Curve("experts" if spec.matching else "teachers", seed, _points(losses))
            for seed, losses in enumerate(made.made.guide_losses)
        ],
        steps=[
            StepRow(name, w.parts, w.reused, w.seconds, w.device_seconds)
            for name, w in ctx.work.items()
        ],
        peak_bytes=made.made.peak_bytes,
        warnings=_warnings(spec, made, controls, main),
        spec_yaml=spec.to_yaml(),
        artifacts=_artifacts(ctx, made, run_uri),
        environment=[(name, version(name)) for name in _LIBRARIES],
        num_images=made.best.part.num_rows,
        control_networks=[
            [_row(n, c.images_per_class, c.num_bytes, t, None) for n, t in c.tests.items()]
            for c in made.controls
        ],
    )


def printed_name(method: str) -> str:
    """A method as its paper writes it."""
    return {"sre2l": "SRe2L"}.get(method, method.replace("_", "-").upper())


def _artifacts(ctx: Context, made: DistillRun, run_uri: str) -> list[tuple[str, str]]:
    images = ctx.store.path(IMAGES, made.images.fingerprint)
    letters = dead_letters_uri(ctx, made.images)
    return [
        ("Run", run_uri),
        ("Images", images),
        *([("Images left out", letters)] if letters else []),
    ]


def dead_letters_uri(ctx: Context, images: Manifest) -> str | None:
    """Where the images that could not be read are listed; None where all could."""
    if DEAD_LETTERS not in images.files:
        return None
    return ctx.store.path(IMAGES, images.fingerprint, DEAD_LETTERS)


def _row(name: str, count: float, num_bytes: int, tested: Tested, seconds: float | None) -> SetRow:
    return SetRow(name, count, num_bytes, list(tested.accuracies), seconds)


def _classes(names: Sequence[str], pictures: Pictures) -> list[ClassRow]:
    return [
        ClassRow(
            name,
            [_text(png) for png in pictures.starts.get(label, [])],
            [_text(png) for png in pictures.made.get(label, [])],
        )
        for label, name in enumerate(names[:_MAX_CLASSES])
    ]


def _text(png: bytes) -> str:
    return b64encode(png).decode()


def _points(losses: Sequence[float]) -> list[tuple[float, float]]:
    return [(float(epoch), loss) for epoch, loss in enumerate(losses, start=1)]


def _losses(made: DistillRun) -> list[Curve]:
    every = [loss for point in made.points for loss in point.losses]
    return [Curve(MAIN, 0, smoothed(every))] if len(every) > 1 else []


def _accuracy(made: DistillRun) -> list[Curve]:
    """Validation accuracy by iteration, one curve a seed; none for a single set."""
    if len(made.points) < 2:
        return []
    return [
        Curve(MAIN, seed, [(float(p.iteration), p.validation[seed]) for p in made.points])
        for seed in range(len(made.best.validation))
    ]


def _of_other_images(spec: DistillSpec, made: DistillRun) -> int:
    """How many of the given experts were trained on other images than the job's."""
    given = (spec.experts.path if spec.experts is not None else None) or []
    own = made.images.fingerprint
    return sum(load_manifest(uri).inputs.get("images", own) != own for uri in given)


def num_skipped(method: Method, points: Sequence[Point]) -> int:
    """Iterations that changed nothing: a loss above `max_loss`, or not finite (not recorded)."""
    if not isinstance(method, TrajectoryMethod) or method.max_loss is None:
        return 0
    losses = [loss for point in points for loss in point.losses]
    return points[-1].iteration - sum(loss <= method.max_loss for loss in losses)


def _warnings(
    spec: DistillSpec, made: DistillRun, controls: Sequence[SetRow], main: SetRow
) -> list[HealthWarning]:
    found: list[HealthWarning] = []
    if made.made.diverged is not None:
        found.append(
            HealthWarning(
                "The matching loss diverged; the best set before it was kept.", made.made.diverged
            )
        )
    as_good = [row for row in controls if row.images_per_class and row.mean >= main.mean]
    if as_good:
        reached = ", ".join(f"{row.name} {row.mean:.3f}" for row in as_good)
        guides = "experts" if spec.matching else "teachers"
        found.append(
            HealthWarning(
                "Real images of equal bytes are as good.",
                f"Test accuracy of {reached}; of the synthetic ones {main.mean:.3f}: give more "
                f"iterations, other step sizes or better {guides}.",
            )
        )
    skipped = num_skipped(spec.method, made.points)
    if skipped > made.points[-1].iteration / 2:
        found.append(
            HealthWarning(
                f"{skipped:,} of {made.points[-1].iteration:,} iterations were skipped.",
                "Their loss lay above `method.max_loss`, or was none: raise it, or lower "
                "`method.max_start_epoch`.",
            )
        )
    if len(made.points) > 1 and made.best.iteration == 0:
        found.append(
            HealthWarning(
                "No set along the way was better than the images it started from.",
                "The real start was kept: lower `method.image_rate`, or give more `experts`.",
            )
        )
    if len(made.points) > 1 and made.chosen == len(made.points) - 1 and made.chosen > 1:
        found.append(
            HealthWarning(
                "The last set was the best: it may not be finished.",
                "Validation accuracy still rose: raise `method.num_iterations`.",
            )
        )
    if strangers := _of_other_images(spec, made):
        found.append(
            HealthWarning(
                f"{strangers} of {len(made.made.fingerprints)} experts saw other images.",
                "`experts.path` names trajectories of another data set, split or subset.",
            )
        )
    if made.images.totals["dead_letters"]:
        found.append(
            HealthWarning(
                f"{made.images.totals['dead_letters']} images could not be read.",
                "They and the reasons stand in `dead_letters.parquet` of the artifact `images`.",
            )
        )
    return found
