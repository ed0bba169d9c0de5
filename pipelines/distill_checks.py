"""What is refused of a distil job as soon as its images are known: before any training."""

import numpy as np

from stillhouse.actors.image_worker import ImageCall
from stillhouse.distillation.methods import Infer
from stillhouse.distillation.network_check import KIND, NetworkTask, run_networks
from stillhouse.distillation.settings import PatchSettings
from stillhouse.distillation.spec import DistillSpec
from stillhouse.distillation.storage_budget import compensator_budget
from stillhouse.distillation.stored_images import SPLITS
from stillhouse.errors import InputError
from stillhouse.fingerprint import fingerprint
from stillhouse.pipelines.context import Context, StepWork
from stillhouse.pipelines.crew import Crew
from stillhouse.pipelines.image_inputs import ImageInputs
from stillhouse.storage.artifact import Manifest, Store
from stillhouse.storage.parquet import read_table

NETWORKS_VERSION = 1


def check_counts(store: Store, spec: DistillSpec, images: Manifest) -> None:
    """The budget can be had, and every class has as many training images as the method takes.

    Raises:
        BudgetError: INFER has no room for a real image.
        InputError: naming the class with the fewest images, and the keys to change.
    """
    method, classes = spec.method, len(images.totals["class_names"])
    if isinstance(method, Infer):
        compensator_budget(method.images_per_class, len(spec.teachers or []), classes)
    factor = method.factor if isinstance(method, PatchSettings) else 1
    wanted = method.images_per_class * factor**2
    if images.totals["least_per_class"] >= wanted:
        return
    name, least = _smallest_class(store, images)
    what = f"{wanted} are needed"
    lower = "`method.images_per_class`"
    if factor > 1:
        what += f" ({factor} x {factor} to an image)"
        lower += " or `method.factor`"
    raise InputError(
        f"class {name!r} has {least} training images, {what}: lower {lower}, or add images"
    )


def _smallest_class(store: Store, images: Manifest) -> tuple[str, int]:
    """The class with the fewest training images, and how many."""
    part = images.parts[SPLITS.index("train")]
    labels = read_table(store.path(part.path), ["label"])["label"].to_numpy()
    names = images.totals["class_names"]
    counts = np.bincount(labels, minlength=len(names))
    least = int(counts.argmin())
    return names[least], int(counts[least])


def check_networks(
    ctx: Context, crew: Crew, spec: DistillSpec, inputs: ImageInputs, images: Manifest
) -> None:
    """Every network can be built by a worker; a dry context builds none and looks further.

    Raises:
        ModelError: naming the key of one that cannot.
    """
    task = network_task(spec, images, inputs.code)
    if ctx.dry:
        ctx.work["networks"] = StepWork(1, len(ctx.store.finished(KIND, [task.fingerprint])))
        return
    crew.do("networks", KIND, [ImageCall(run_networks, task, prepared=False)])


def network_task(spec: DistillSpec, images: Manifest, code: tuple[str, ...] = ()) -> NetworkTask:
    """The networks that the job is going to build, by key; `code` are digests of the user's own."""
    judges = [(f"evaluate.networks.{i}", n) for i, n in enumerate(spec.evaluate.networks)]
    own = [("network", spec.network)] if spec.matching or not judges else []
    teachers = [(f"teachers.{i}", n) for i, n in enumerate(spec.teachers or [])]
    channels, height, width = images.totals["shape"]
    classes = len(images.totals["class_names"])
    built = [[key, network.model_dump()] for key, network in [*own, *judges, *teachers]]
    name = fingerprint(
        ["networks", NETWORKS_VERSION, images.totals["shape"], classes, built, *code]
    )
    return NetworkTask(name, (*own, *judges), (*teachers,), (channels, height, width), classes)
