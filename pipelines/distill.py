"""The distil job: images -> experts or teachers -> sets -> the best -> tests.

Every stage is tasks with receipts in the store: a killed run redoes only what was in flight.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import prod
from statistics import fmean
from time import perf_counter
from typing import Any

import numpy as np

from stillhouse.distillation.decoupled import (
    LABEL_SEED,
    AssemblyTask,
    DecoupledMethod,
    TeacherTask,
    UnitTask,
)
from stillhouse.distillation.experts import TRAJECTORIES, ExpertTask, resolved
from stillhouse.distillation.given_teachers import AnyTeacher, GivenTeacher, GivenTeacherTask
from stillhouse.distillation.matching import TrajectoryMethod
from stillhouse.distillation.matching_task import GivenExpert, MatchingTask, run_matching
from stillhouse.distillation.prepared import (
    IMAGES,
    SPLITS,
    ImageHostSettings,
    ImagesTask,
    Teacher,
)
from stillhouse.distillation.set_tasks import (
    REAL,
    ControlName,
    ControlTask,
    ResultTask,
    SetSource,
    stored_set,
)
from stillhouse.distillation.spec import DistillSpec, ExpertSettings
from stillhouse.distillation.stored_sets import StoredBytes, hard_label_bytes
from stillhouse.errors import ArtifactError, InputError
from stillhouse.pipelines.context import Context, Step, perform
from stillhouse.pipelines.evaluation import Control, Evaluator, Tested
from stillhouse.pipelines.image_inputs import ImageInputs
from stillhouse.pipelines.workers import STEP, run_workers
from stillhouse.storage.artifact import Manifest, PartRef, Receipt, Store, load_manifest
from stillhouse.storage.parquet import read_table
from stillhouse.storage.task import Task
from stillhouse.training.group import WorkerGroup
from stillhouse.training.task import Tell

_CONTROL_SEED = 1_000_000
"""Offset of the controls' seed, so that they are not the images that the method starts from."""
_SHOWN_SNAPSHOTS = 6


@dataclass(frozen=True, slots=True)
class SetSnapshot:
    """The set after `iteration` updates; `validation` are accuracies by seed."""

    iteration: int
    part: PartRef
    losses: tuple[float, ...]
    learning_rate: float | None
    seconds: float
    validation: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class MadeSets:
    """The sets that a method made.

    Attributes:
        snapshots: one for decoupled methods.
        fingerprints: of experts or teachers.
        guide_losses: their training losses by epoch; none of given experts.
        label_path: of stored labels of views.
        stored: bytes, where the set itself does not say.
        diverged: why it ended early, or None.
        peak_bytes: peak memory of the workers that made them, where it was measured.
        learned_from: URIs of experts or teachers.
        starts: parts of the stage before the last one, by unit (NRR-DD's patches, by class).
    """

    snapshots: tuple[SetSnapshot, ...]
    fingerprints: tuple[str, ...]
    guide_losses: tuple[list[float], ...] = ()
    label_path: str | None = None
    stored: StoredBytes | None = None
    diverged: str | None = None
    peak_bytes: int | None = None
    learned_from: tuple[str, ...] = ()
    starts: tuple[PartRef, ...] = ()


class DistillJob:
    """What all steps of a distil job share."""

    def __init__(self, ctx: Context, spec: DistillSpec, inputs: ImageInputs) -> None:
        compute = spec.compute
        gpus, threads = compute.gpus_of(compute.trainer), compute.threads_per_worker
        self.ctx, self.spec, self.inputs, self.preparation = ctx, spec, inputs, inputs.preparation
        self.host = ImageHostSettings(self.preparation, compute.device, gpus, threads, spec.built)

    def do(self, title: str, tasks: Sequence[Task], workers: int = 1) -> list[Receipt]:
        """The receipts of a step's tasks."""
        on = self.ctx.compute.trainer
        return perform(self.ctx, Step(title, tasks, self.host, workers, on, "images"))

    @cached_property
    def images(self) -> Manifest:
        """The images artifact, made and checked on first use."""
        self.do("images", [ImagesTask(self.preparation, self.spec.data)])
        images = self.ctx.store.get_manifest(IMAGES, self.preparation.images)
        check_counts(self.ctx.store, self.spec, images)
        return images

    @property
    def num_classes(self) -> int:
        return len(self.images.totals["class_names"])


@dataclass(frozen=True)
class DistillRun:
    """All that a finished distil job made; `tests` by network, the spec's first one first."""

    images: Manifest
    job: DistillJob
    made: MadeSets
    chosen: int
    stored: StoredBytes
    tests: dict[str, Tested]
    controls: Sequence[Control] = ()

    @property
    def best(self) -> SetSnapshot:
        """The set that was chosen on the validation part."""
        return self.made.snapshots[self.chosen]

    @property
    def tested(self) -> Tested:
        """On the network that the set was chosen for."""
        return next(iter(self.tests.values()))


def run_distill(ctx: Context, spec: DistillSpec, inputs: ImageInputs) -> DistillRun:
    """Images to the tested set. A dry context raises `Unfinished` at the first thing to do."""
    job = DistillJob(ctx, spec, inputs)
    images, method = job.images, spec.method
    if isinstance(method, TrajectoryMethod):
        made, learned_by = _matching(job, method), None
    else:
        assert isinstance(method, DecoupledMethod)
        made = _decoupled(job, method)
        learned_by = method if made.label_path else None
    evaluator = Evaluator(job.do, spec, images, job.preparation)
    sets = [
        (SetSource(one.part, made.label_path, learned_by), one.learning_rate)
        for one in made.snapshots
    ]
    accuracies = evaluator.compare("choose", sets)
    pairs = zip(made.snapshots, accuracies, strict=True)
    made = replace(made, snapshots=tuple(replace(one, validation=a) for one, a in pairs))
    chosen = max(range(len(sets)), key=lambda i: (fmean(accuracies[i]), -i))
    stored = made.stored or stored_set(ctx.store, made.snapshots[chosen].part).stored
    tests, controls = evaluator.test(sets[chosen], _controls(job, stored))
    return DistillRun(images, job, made, chosen, stored, tests, controls)


def check_counts(store: Store, spec: DistillSpec, images: Manifest) -> None:
    """Refuse a budget that the images cannot fill.

    Raises:
        BudgetError: INFER has no room for a real image.
        InputError: naming the class with the fewest images, and the keys to change.
    """
    method, names = spec.method, images.totals["class_names"]
    if isinstance(method, DecoupledMethod):
        method.units(method.stages[0], len(spec.teachers or []), len(names))
    factor = method.patches_per_side
    needed = method.images_per_class * factor**2
    if images.totals["least_per_class"] >= needed:
        return
    part = images.parts[SPLITS.index("train")]
    labels = read_table(store.path(part.path), ["label"])["label"].to_numpy()
    counts = np.bincount(labels, minlength=len(names))
    what, lower = f"{needed} are needed", "`method.images_per_class`"
    if factor > 1:
        what += f" ({factor} x {factor} to an image)"
        lower += " or `method.factor`"
    raise InputError(
        f"class {names[counts.argmin()]!r} has {counts.min()} training images, {what}: lower "
        f"{lower}, or add images"
    )


def _matching(job: DistillJob, method: TrajectoryMethod) -> MadeSets:
    spec, preparation, experts = job.spec, job.preparation, job.inputs.experts
    settings = resolved(spec.experts or ExpertSettings(), method.experts)
    epochs, groups = settings.epochs, tuple(spec.preprocessing.augmentation)
    losses: tuple[list[float], ...] = ()
    if experts:
        epochs = max(load_manifest(experts[0].uri).totals["epochs"])
    else:
        keep, seeds = (
            method.epochs_kept(settings),
            range(settings.seed, settings.seed + settings.count),
        )
        of_seed = [
            settings.model_copy(update={"count": 1, "keep": "all", "seed": s}) for s in seeds
        ]
        tasks = [ExpertTask(preparation, spec.network, each, groups, keep) for each in of_seed]
        receipts = job.do("experts", tasks, spec.compute.experts)
        losses = tuple(receipt.info["losses"] for receipt in receipts)
        experts = tuple(
            GivenExpert(r.task, job.ctx.store.path(TRAJECTORIES, r.task)) for r in receipts
        )
    task = MatchingTask(preparation, spec.network, method, experts, epochs, groups)
    receipts = distil(job.ctx, task, job.host)
    infos = [(r.parts[0], r.info) for r in receipts if r.parts]
    snapshots = [
        SetSnapshot(i["iteration"], part, tuple(i["losses"]), i["learning_rate"], i["seconds"])
        for part, i in infos
    ]
    return MadeSets(
        tuple(snapshots),
        tuple(expert.name for expert in experts),
        losses,
        diverged=next((r.info["diverged"] for r in receipts if "diverged" in r.info), None),
        peak_bytes=max((info["peak_bytes"] for _, info in infos), default=0) or None,
        learned_from=tuple(expert.uri for expert in experts),
    )


def distil(ctx: Context, task: MatchingTask, host: ImageHostSettings) -> list[Receipt]:
    """Run or resume a distillation; the receipts of its sets in order.

    Raises:
        DivergedError: nothing was learned. ArtifactError: sets were deleted meanwhile. Any error of
            `run_workers`.
    """
    names, step = task.names, "distil"
    done, total = ctx.store.finished(task.KIND, names), len(names)
    reached = float(len(done))
    with ctx.step(step, total=total, reused=len(done), unit="iterations") as advance:
        if len(done) < total:
            ctx.close_pool()  # its resources are needed by the distillers
            started, per_set = perf_counter(), task.method.num_iterations / total

            def on_event(kind: str, content: dict[str, Any]) -> None:
                nonlocal reached
                moved = max(content["step"] / per_set - reached, 0) if kind == STEP else 0
                reached += moved
                advance(moved, moved * per_set)

            compute = ctx.compute.model_copy(
                update={"trainers": ctx.compute.distillers, "min_trainers": None}
            )
            what, work = "the distillation", partial(_work, ctx.store, host, task)
            inner = replace(ctx, compute=compute)
            run_workers(inner, what, work, on_event, setting="compute.distillers")
            done = ctx.store.finished(task.KIND, names)
            if len(done) < total:
                raise ArtifactError(
                    f"{total - len(done)} of the distillation's {total} sets were deleted from "
                    f"{ctx.store.path(task.KIND)} while it ran: run the job again"
                )
            busy = (perf_counter() - started) * compute.trainers
            ctx.work[step].worked(busy, compute.resources(compute.trainer_gpus))
    return [done[name] for name in names]


def _work(store: Store, host: ImageHostSettings, task: MatchingTask, tell: Tell) -> None:
    run_matching(host.build(store), task, WorkerGroup.current(), tell)


def _decoupled(job: DistillJob, method: DecoupledMethod) -> MadeSets:
    spec, preparation, classes = job.spec, job.preparation, job.num_classes
    teachers, losses_of = _teachers(job)
    stages: list[list[Receipt]] = [[]]
    for stage in method.stages:
        before = tuple(receipt.parts[0] for receipt in stages[-1])
        units = [
            UnitTask(preparation, method, stage, unit, teachers[unit.teacher], before)
            for unit in method.units(stage, len(teachers), classes)
        ]
        stages.append(job.do(stage, units, spec.compute.distillers))
    parts = tuple(receipt.parts[0] for receipt in stages[-1])
    assembly = AssemblyTask(preparation, method, spec.protocol(classes), teachers, parts)
    (done,) = job.do("labels", [assembly])
    losses = tuple(stages[-1][0].info["losses"])
    seconds = sum(receipt.info["seconds"] for stage in stages for receipt in stage)
    return MadeSets(
        (SetSnapshot(len(losses), done.parts[0], losses, None, seconds),),
        tuple(teacher.weights for teacher in teachers),
        losses_of,
        done.info["label_path"],
        StoredBytes(*done.info["stored"]),
        peak_bytes=max(receipt.info["peak_bytes"] for receipt in stages[-1]) or None,
        learned_from=tuple(teacher.uri(job.ctx.store) for teacher in teachers),
        starts=tuple(receipt.parts[0] for receipt in stages[-2]),
    )


def _teachers(job: DistillJob) -> tuple[tuple[AnyTeacher, ...], tuple[list[float], ...]]:
    """All teachers in the order of the spec, and the losses of those that the job trains."""
    spec, preparation = job.spec, job.preparation
    given = {i: GivenTeacher(one, f"teachers.{i}") for i, one in job.inputs.teachers.items()}
    if given:
        job.do("given teachers", [GivenTeacherTask(preparation, one) for one in given.values()])
    recipe, networks = spec.teacher_recipe, spec.trained_teachers
    tasks = {i: TeacherTask(preparation, one, recipe, seed=i) for i, one in networks.items()}
    trained = job.do("teachers", [*tasks.values()], spec.compute.experts) if tasks else []
    own = {i: Teacher(task.network, task.fingerprint) for i, task in tasks.items()}
    found: dict[int, AnyTeacher] = {**given, **own}
    losses = tuple(receipt.info["losses"] for receipt in trained)
    return tuple(found[i] for i in sorted(found)), losses


def _controls(job: DistillJob, stored: StoredBytes) -> list[Control]:
    """Real images for the bytes of the set, by each baseline of the spec."""
    names: list[ControlName] = [name for name in job.spec.controls if name != "full"]
    if not names:
        return []
    totals, classes = job.images.totals, job.num_classes
    one = prod(totals["shape"]) + hard_label_bytes(1, classes)
    count = min(max(classes, stored.total // one), classes * totals["least_per_class"])
    seed = job.spec.method.seed + _CONTROL_SEED
    tasks = [ControlTask(job.preparation, name, count, seed) for name in names]
    receipts = job.do("controls", tasks)
    return [
        Control(name, receipt.parts[0], count * one, count / classes)
        for name, receipt in zip(names, receipts, strict=True)
    ]


Pngs = dict[int, list[bytes]]
"""By class."""


@dataclass(frozen=True, slots=True)
class Pictures:
    """Real images, the chosen set, and sets by iteration."""

    starts: Pngs
    made: Pngs
    by_iteration: dict[int, Pngs]


def put_result(run: DistillRun) -> tuple[Manifest, Pictures]:
    """Commit the artifact of the chosen set; its manifest and pictures."""
    best, made, job = run.best, run.made, run.job
    spec, store = job.spec, job.ctx.store
    protocol = spec.protocol(job.num_classes, best.learning_rate)
    totals: dict[str, Any] = {
        "method": spec.method.name,
        "images_per_class": spec.method.images_per_class,
        "bytes": run.stored.total,
        "image_bytes": run.stored.images,
        "label_bytes": run.stored.labels,
        "learning_rate": best.learning_rate,
        "iteration": best.iteration,
        "trained_by": {
            "labels": spec.method.label_kind,
            "recipe": protocol.recipe.model_dump(mode="json"),
            "augmentation": list(spec.set_augmentation),
            "temperature": protocol.temperature,
            "view_seed": None if made.label_path is None else LABEL_SEED,
        },
    }
    inputs = {"images": job.preparation.images, "learned_from": list(made.fingerprints)}
    # the first, the chosen and the last set, and some evenly between
    last, count = len(made.snapshots) - 1, min(_SHOWN_SNAPSHOTS, len(made.snapshots))
    indices = {round(i * last / max(1, count - 1)) for i in range(count)} | {run.chosen}
    sets = tuple((s.iteration, s.part) for i, s in enumerate(made.snapshots) if i in indices)
    settings = spec.method.model_dump(mode="json")
    task = ResultTask(
        job.preparation,
        best.part,
        made.label_path,
        inputs,
        settings,
        totals,
        shown=sets,
        real=last == 0,
        starts=made.starts,
    )
    (done,) = job.do("result", [task])
    pngs: dict[int, Pngs] = {}
    for row in read_table(store.path(done.parts[1].path)).to_pylist():
        pngs.setdefault(row["point"], {}).setdefault(row["label"], []).append(row["png"])
    by_iteration = {iteration: pngs[iteration] for iteration in sorted(pngs) if iteration != REAL}
    pictures = Pictures(pngs[min(pngs)], pngs[best.iteration], by_iteration)
    return store.get_manifest("distilled", task.fingerprint), pictures
