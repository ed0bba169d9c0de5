"""The distil job on one page: images -> experts or teachers -> sets -> the best -> tests.

Every stage is tasks with receipts in the store: a run that was killed redoes what was in flight.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any

from stillhouse.actors.image_worker import ImageCall, ImageWork
from stillhouse.distillation.controls_job import ControlName, ControlTask, run_control
from stillhouse.distillation.decoupled_job import (
    AssemblyTask,
    MethodTask,
    plan_refinement,
    plan_units,
    run_assembly,
    run_unit,
)
from stillhouse.distillation.evaluate_job import SetSource
from stillhouse.distillation.expert_job import ExpertTask, TeacherTask, run_expert, run_teacher
from stillhouse.distillation.expert_options import expert_options, kept_epochs
from stillhouse.distillation.matching_job import MatchingTask
from stillhouse.distillation.methods import (
    DecoupledMethod,
    ExpertSettings,
    Infer,
    NrrDd,
    TrajectoryMethod,
)
from stillhouse.distillation.settings import DistanceSettings
from stillhouse.distillation.spec import DistillSpec
from stillhouse.distillation.storage_budget import (
    StoredBytes,
    hard_label_bytes,
)
from stillhouse.distillation.stored_images import KIND as IMAGES
from stillhouse.distillation.stored_images import ImageSourceTask, run_source
from stillhouse.fingerprint import fingerprint
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.crew import Crew
from stillhouse.pipelines.distill_checks import check_counts
from stillhouse.pipelines.distilling import distil
from stillhouse.pipelines.evaluation import Control, ControlSet, Evaluator, Tested, set_protocol
from stillhouse.pipelines.image_inputs import ImageInputs
from stillhouse.storage.artifact import Manifest, PartRef, Receipt, load_manifest

EXPERT_VERSION = 1
DISTIL_VERSION = 2
APART_VERSION = 1
"""Of how INFER's sets are stored; its compensators are found again across it."""
_CONTROL_SEED = 1_000_000
"""Away from the method's own: the control is no second look at the images that it began as."""


@dataclass(frozen=True, slots=True)
class Point:
    """A set along the way: after `iteration` updates; `validation` are accuracies by seed."""

    iteration: int
    part: PartRef
    losses: tuple[float, ...]
    learning_rate: float | None
    seconds: float
    validation: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Made:
    """The sets that a method made, before any was chosen.

    Attributes:
        name: of the distillation.
        points: the sets; one for the decoupled methods.
        label_path, label_sha256: of stored labels of views.
        stored: bytes, where they are not in the set itself.
        fingerprints: of experts or teachers.
        diverged: why it ended early, or None.
        peak_bytes: memory of the worker that made them, where it was measured.
        starts: paths of NRR-DD's patches before their refinement, by class.
    """

    name: str
    points: tuple[Point, ...]
    fingerprints: tuple[str, ...]
    label_path: str | None = None
    label_sha256: str | None = None
    stored: StoredBytes | None = None
    diverged: str | None = None
    peak_bytes: int | None = None
    starts: tuple[str, ...] = ()


@dataclass
class DistillRun:
    """All that a finished distil job made."""

    images: Manifest
    made: Made
    chosen: int
    points: list[Point]
    tests: dict[str, Tested]
    """By network, the spec's first one first."""
    stored: StoredBytes
    controls: list[Control] = field(default_factory=list[Control])
    expert_losses: list[list[float]] = field(default_factory=list[list[float]])

    @property
    def best(self) -> Point:
        """The set that was chosen on the validation part."""
        return self.points[self.chosen]


def run_distill(ctx: Context, crew: Crew, spec: DistillSpec, inputs: ImageInputs) -> DistillRun:
    """Images to the tested set. A dry context raises `Unfinished` at the first thing to do."""
    images = _images(ctx, crew, spec, inputs)
    check_counts(ctx.store, spec, images)
    work = image_work(spec, inputs.images)
    base = [inputs.images, spec.preprocessing.zca, *inputs.code]
    expert_losses: list[list[float]] = []
    if isinstance(spec.method, TrajectoryMethod):
        made = _matching(ctx, crew, spec, spec.method, inputs, work, base, expert_losses)
    else:
        made = _decoupled(ctx, crew, spec, spec.method, images, base, expert_losses)
    return _judge(ctx, crew, spec, images, work, base, made, expert_losses)


def image_work(spec: DistillSpec, images: str) -> ImageWork:
    """What the job's workers are made from."""
    compute = spec.compute
    return ImageWork(
        images,
        spec.preprocessing.zca,
        compute.device,
        compute.gpus_of(compute.trainer),
        compute.threads_per_worker,
        spec.built,
    )


def _images(ctx: Context, crew: Crew, spec: DistillSpec, inputs: ImageInputs) -> Manifest:
    task = ImageSourceTask(inputs.images, spec.data)
    crew.do("images", IMAGES, [ImageCall(run_source, task, prepared=False)])
    return ctx.store.get_manifest(IMAGES, inputs.images)


def _matching(
    ctx: Context,
    crew: Crew,
    spec: DistillSpec,
    method: TrajectoryMethod,
    inputs: ImageInputs,
    work: ImageWork,
    base: list[Any],
    losses: list[list[float]],
) -> Made:
    settings = spec.experts or ExpertSettings()
    groups = tuple(spec.preprocessing.augmentation)
    if inputs.experts:
        uris = tuple(uri for uri, _ in inputs.experts)
        names = tuple(name for _, name in inputs.experts)
        epochs = max(load_manifest(uris[0]).totals["epochs"])
    else:
        tasks = expert_tasks(spec, settings, method, base)
        calls = [ImageCall(run_expert, task) for task in tasks]
        receipts = crew.do("experts", "trajectories", calls, workers=ctx.compute.experts)
        losses += [receipt.info["losses"] for receipt in receipts]
        names = tuple(task.fingerprint for task in tasks)
        uris = tuple(ctx.store.path("trajectories", name) for name in names)
        epochs = settings.epochs
    asked = method.model_dump(mode="json")
    name = fingerprint(
        [
            "distil",
            DISTIL_VERSION,
            base,
            spec.preprocessing.augmentation,
            spec.network.model_dump(),
            asked,
            names,
        ]
    )
    task = MatchingTask(name, spec.network, method, uris, epochs, groups)
    crew.dismiss()  # what they hold is the distillers' for as long as that takes
    receipts = distil(ctx, work, task)
    diverged = next((r.info["diverged"] for r in receipts if "diverged" in r.info), None)
    points = [_point(r) for r in receipts if r.parts]
    peak = max((r.info["peak_bytes"] for r in receipts if r.parts), default=0)
    return Made(name, tuple(points), names, diverged=diverged, peak_bytes=peak or None)


def _point(receipt: Receipt) -> Point:
    info = receipt.info
    return Point(
        info["iteration"],
        receipt.parts[0],
        tuple(info["losses"]),
        info["learning_rate"],
        info["seconds"],
    )


def expert_tasks(
    spec: DistillSpec, settings: ExpertSettings, method: TrajectoryMethod, base: list[Any]
) -> list[ExpertTask]:
    """One task an expert, named by all that decides its trajectory."""
    groups = tuple(spec.preprocessing.augmentation)
    options = expert_options(settings, spec.method.name, groups)
    keep = kept_epochs(settings, method)
    tasks: list[ExpertTask] = []
    for i in range(settings.count):
        seed = settings.seed + i
        identity = [spec.network.model_dump(), asdict(options), keep, settings.stored_as, seed]
        name = fingerprint(["expert", EXPERT_VERSION, base, *identity])
        tasks.append(ExpertTask(name, spec.network, options, keep, settings.stored_as, seed))
    return tasks


def _decoupled(
    ctx: Context,
    crew: Crew,
    spec: DistillSpec,
    method: DecoupledMethod,
    images: Manifest,
    base: list[Any],
    losses: list[list[float]],
) -> Made:
    tasks: list[TeacherTask] = []
    recipe = spec.teacher_recipe
    for seed, network in enumerate(spec.teachers or []):
        identity = [network.model_dump(), recipe.model_dump(), seed]
        name = fingerprint(["teacher", EXPERT_VERSION, base, *identity])
        tasks.append(TeacherTask(name, network, recipe, seed))
    trained = [ImageCall(run_teacher, task) for task in tasks]
    receipts = crew.do("teachers", "models", trained, workers=ctx.compute.experts)
    losses += [receipt.info["losses"] for receipt in receipts]
    names = tuple(task.fingerprint for task in tasks)
    classes = len(images.totals["class_names"])
    protocol = set_protocol(spec, classes, None)
    asked = method.model_dump(mode="json")
    labelled = [protocol.recipe.model_dump(), protocol.temperature]
    name = fingerprint(["decoupled", DISTIL_VERSION, base, names, asked, labelled])
    teachers = tuple((t.network, t.fingerprint) for t in tasks)

    def run(step: str, planned: Sequence[MethodTask]) -> list[Receipt]:
        calls = [ImageCall(run_unit, task, teachers) for task in planned]
        return crew.do(step, "distilled", calls, workers=ctx.compute.distillers)

    planned = plan_units(name, method, len(tasks), classes)
    first: list[Receipt] = []
    if isinstance(method, NrrDd):
        first = run("patches", planned)
        planned = plan_refinement(name, method, classes, [r.parts[0].path for r in first])
    units = run("distil", planned)
    whole = fingerprint(["apart", APART_VERSION, name]) if isinstance(method, Infer) else name
    assembly = AssemblyTask(whole, method, protocol, tuple(r.parts[0].path for r in units))
    (done,) = crew.do("labels", "distilled", [ImageCall(run_assembly, assembly, teachers)])
    seconds = sum(r.info["seconds"] for r in [*first, *units])
    unit_losses = tuple(units[0].info["losses"])
    peak = max(r.info.get("peak_bytes", 0) for r in units)
    return Made(
        name,
        (Point(len(unit_losses), done.parts[0], unit_losses, None, seconds),),
        names,
        done.info["label_path"],
        done.info["label_sha256"],
        StoredBytes(*done.info["stored"]),
        peak_bytes=peak or None,
        starts=tuple(r.parts[0].path for r in first),
    )


def _judge(
    ctx: Context,
    crew: Crew,
    spec: DistillSpec,
    images: Manifest,
    work: ImageWork,
    base: list[Any],
    made: Made,
    expert_losses: list[list[float]],
) -> DistillRun:
    """Choose on the validation part, then test once; the controls beside it."""
    judge = Evaluator(ctx, crew, spec, images, base)
    kind = getattr(spec.method, "labels", None)
    learned = spec.method.distances if isinstance(spec.method, NrrDd) else DistanceSettings()

    def source(part: PartRef) -> SetSource:
        named = kind if made.label_path is not None else None
        return SetSource(part.path, made.label_path, named, learned)

    along = [(source(p.part), p.part.sha256, p.learning_rate) for p in made.points]
    compared = judge.compare("choose", along)
    points = [
        replace(point, validation=accuracies)
        for point, accuracies in zip(made.points, compared, strict=True)
    ]
    chosen = max(range(len(points)), key=lambda i: (fmean(points[i].validation), -i))
    best = points[chosen]
    stored = made.stored or judge.stored_bytes(best.part)
    sets = _control_sets(crew, spec, images, work, stored)
    rates = [None] if best.learning_rate is None else [None, best.learning_rate]
    tests, controls = judge.final(along[chosen], sets, rates)
    return DistillRun(images, made, chosen, points, tests, stored, controls, expert_losses)


def _control_sets(
    crew: Crew,
    spec: DistillSpec,
    images: Manifest,
    work: ImageWork,
    stored: StoredBytes,
) -> list[ControlSet]:
    """Name, part, bytes and images per class of each control but `full`."""
    wanted: list[ControlName] = [name for name in spec.controls if name != "full"]
    if not wanted:
        return []
    shape, classes = images.totals["shape"], len(images.totals["class_names"])
    one = shape[0] * shape[1] * shape[2] + hard_label_bytes(1, classes)
    within = max(classes, stored.total // one)
    count = min(within, classes * images.totals["least_per_class"])
    seed = spec.method.seed + _CONTROL_SEED
    tasks = [
        ControlTask(
            fingerprint(["control", 2, work.images, work.zca, control, count, seed]),
            control,
            count,
            seed,
        )
        for control in wanted
    ]
    receipts = crew.do("controls", "distilled", [ImageCall(run_control, task) for task in tasks])
    return [
        (control, receipt.parts[0], count * one, count / classes)
        for control, receipt in zip(wanted, receipts, strict=True)
    ]
