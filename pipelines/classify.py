"""`job: train` with `task: classify`: samples -> teachers' logits -> workers -> model artifact."""

from dataclasses import dataclass

from stillhouse.classification.samples import RowsTask
from stillhouse.classification.signals import LogitsTask, ViewLogitsTask
from stillhouse.classification.spec import ClassifierTraining, ClassifySpec
from stillhouse.classification.task import (
    ClassifyTask,
    StartClassifier,
    StoredClassifier,
    resolved,
)
from stillhouse.classification.unlabelled import UNLABELLED, UnlabelledSet, UnlabelledTask
from stillhouse.distillation.prepared import (
    IMAGES,
    SPLITS,
    ImageHostSettings,
    ImagesTask,
)
from stillhouse.models.network_settings import NetworkSettings
from stillhouse.pipelines.classify_data import ClassifyInputs
from stillhouse.pipelines.context import Context, Step, perform
from stillhouse.pipelines.given import Needs, given_models
from stillhouse.pipelines.teachers import SIGNALS, check_objective
from stillhouse.pipelines.tokenizer import given_tokenizer
from stillhouse.pipelines.tokens import TokenizerRef
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
    check_objective(ctx, spec.train.objective, inputs.own)
    compute, name = spec.compute, inputs.preparation.images
    host = ImageHostSettings(
        inputs.preparation,
        compute.device,
        compute.gpus_of(compute.trainer),
        compute.threads_per_worker,
    )
    tokenizer = None
    if inputs.tokenizer is not None:
        tokenizer = given_tokenizer(ctx, inputs.tokenizer, None, "auto")
    network, body = _network(ctx, spec, tokenizer)
    tasks = [_samples_task(spec, inputs, tokenizer)]
    perform(ctx, Step("images", tasks, host, 1, compute.trainer, spec.data.kind))
    images = ctx.store.get_manifest(IMAGES, name)
    num_images = images.parts[SPLITS.index("train")].num_rows
    others = _unlabelled(ctx, spec, inputs, host)
    settings, num_steps = resolved(
        spec.train, num_images, num_unlabelled=others.part.num_rows if others else 0
    )
    logits: tuple[PartRef, ...] = ()
    if inputs.stored:
        asked = [
            _logits_task(settings, name, one, f"train.objective.teachers.{i}")
            for i, one in enumerate(inputs.teachers)
        ]
        made = perform(ctx, Step(SIGNALS, asked, host, len(asked), compute.trainer, spec.data.kind))
        logits = tuple(receipt.parts[0] for receipt in made)
    init = spec.init
    task = ClassifyTask(
        images=name,
        num_images=num_images,
        network=None if init else network,
        init=StartClassifier(inputs.init, init.head, init.frozen) if init and inputs.init else None,
        settings=settings,
        num_steps=num_steps,
        code=inputs.preparation.code,
        own=inputs.own,
        teachers=inputs.teachers,
        logits=logits,
        unlabelled=others,
        body=body,
        tokenizer=tokenizer.path if tokenizer else "",
        label=spec.name or "classifier",
        device=compute.device,
        gpus=compute.trainer_gpus,
    )
    check_workers(task.order(), compute.trainers)
    with Gang(ctx) as gang:
        [model] = run_trainings(ctx, gang, "train", [task], spec.data.kind)
    return ClassifyRun(images, model, task)


def _logits_task(
    settings: ClassifierTraining, images: str, teacher: StoredClassifier, key: str
) -> LogitsTask:
    """What asks a teacher for its logits of all images, or of all views of them."""
    if settings.views is None:
        return LogitsTask(images, teacher, key)
    augmentation = tuple(settings.augmentation)
    return ViewLogitsTask(images, teacher, key, augmentation, settings.seed, settings.views)


def _samples_task(
    spec: ClassifySpec, inputs: ClassifyInputs, tokenizer: TokenizerRef | None
) -> ImagesTask:
    """What makes the arrays of the samples."""
    if spec.data.kind == "images":
        return ImagesTask(inputs.preparation, spec.data)
    path, digest = (tokenizer.path, tokenizer.digest) if tokenizer else ("", "")
    return RowsTask(inputs.preparation, spec.data, path, digest)


def _network(
    ctx: Context, spec: ClassifySpec, tokenizer: TokenizerRef | None
) -> tuple[NetworkSettings, str]:
    """The network to build; a language model by its content, and its folder in the store."""
    if tokenizer is None or spec.network.path is None:
        return spec.network, ""
    needs = Needs(tokenizer.vocab_size, spec.data.length)
    [model] = given_models(ctx, {"network": spec.network.path}, needs).values()
    return spec.network.model_copy(update={"path": model.fingerprint}), model.folder


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
