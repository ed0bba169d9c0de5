"""`job: train` with `task: classify`: images -> teachers' logits -> workers -> model artifact."""

from dataclasses import dataclass

from stillhouse.classification.signals import LogitsTask
from stillhouse.classification.spec import ClassifySpec
from stillhouse.classification.task import ClassifyTask, StartClassifier, resolved
from stillhouse.classification.unlabelled import UNLABELLED, UnlabelledSet, UnlabelledTask
from stillhouse.distillation.prepared import (
    IMAGES,
    SPLITS,
    ImageHostSettings,
    ImagesTask,
)
from stillhouse.pipelines.classify_data import ClassifyInputs
from stillhouse.pipelines.context import Context, Step, perform
from stillhouse.pipelines.teachers import SIGNALS
from stillhouse.pipelines.training import run_trainings
from stillhouse.pipelines.workers import Gang
from stillhouse.storage.artifact import Manifest, PartRef
from stillhouse.training.order import check_workers


@dataclass(frozen=True, slots=True)
class ClassifyRun:
    """The results of a job."""

    images: Manifest
    model: Manifest
    task: ClassifyTask


def run_classify(ctx: Context, spec: ClassifySpec, inputs: ClassifyInputs) -> ClassifyRun:
    """Train the classifier of a spec, or find it in the store.

    Raises:
        StillhouseError: run again to continue from the last checkpoint.
    """
    compute, name = spec.compute, inputs.preparation.images
    host = ImageHostSettings(
        inputs.preparation,
        compute.device,
        compute.gpus_of(compute.trainer),
        compute.threads_per_worker,
    )
    tasks = [ImagesTask(inputs.preparation, spec.data)]
    perform(ctx, Step("images", tasks, host, 1, compute.trainer, "images"))
    images = ctx.store.get_manifest(IMAGES, name)
    num_images = images.parts[SPLITS.index("train")].num_rows
    others = _unlabelled(ctx, spec, inputs, host)
    settings, num_steps = resolved(
        spec.train, num_images, num_unlabelled=others.part.num_rows if others else 0
    )
    logits: tuple[PartRef, ...] = ()
    if inputs.stored:
        asked = [
            LogitsTask(name, one, f"train.objective.teachers.{i}")
            for i, one in enumerate(inputs.teachers)
        ]
        made = perform(ctx, Step(SIGNALS, asked, host, len(asked), compute.trainer, "images"))
        logits = tuple(receipt.parts[0] for receipt in made)
    init = spec.init
    task = ClassifyTask(
        images=name,
        num_images=num_images,
        network=None if init else spec.network,
        init=StartClassifier(inputs.init, init.head, init.frozen) if init and inputs.init else None,
        settings=settings,
        num_steps=num_steps,
        code=inputs.preparation.code,
        own=inputs.own,
        teachers=inputs.teachers,
        logits=logits,
        unlabelled=others,
        label=spec.name or "classifier",
        device=compute.device,
        gpus=compute.trainer_gpus,
    )
    check_workers(task.order(), compute.trainers)
    with Gang(ctx) as gang:
        [model] = run_trainings(ctx, gang, "train", [task], "images")
    return ClassifyRun(images, model, task)


def _unlabelled(
    ctx: Context, spec: ClassifySpec, inputs: ClassifyInputs, host: ImageHostSettings
) -> UnlabelledSet | None:
    """The images without labels, read where they are not in the store."""
    if spec.unlabelled is None or inputs.unlabelled is None:
        return None
    task = UnlabelledTask(
        inputs.preparation.images, inputs.unlabelled, spec.data.image_size, spec.unlabelled
    )
    [made] = perform(ctx, Step(UNLABELLED, [task], host, 1, spec.compute.trainer, "images"))
    return UnlabelledSet(made.parts[0], spec.unlabelled.share)
