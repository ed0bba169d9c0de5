"""The training of a classifier as plain values. Without torch, which the driver never imports."""

from dataclasses import dataclass
from typing import Any, ClassVar

from stillhouse.classification.spec import BATCH, RATE, ClassifierTraining
from stillhouse.classification.unlabelled import UnlabelledSet
from stillhouse.custom_code import CustomCode
from stillhouse.errors import InputError
from stillhouse.models.network_settings import NetworkSettings
from stillhouse.storage.artifact import PartRef
from stillhouse.storage.task import Place, Task
from stillhouse.training.order import Rows, SampleOrder, default_lanes
from stillhouse.training.task import checkpoints_of, steps_between

CONFIG = "config.json"
"""Beside the weights: network, shape, classes and standardisation, with which it is built again."""


@dataclass(frozen=True, slots=True)
class StoredClassifier:
    """A classifier in a folder (`config.json`, `weights.safetensors`), or a state dict.

    Attributes:
        digest: of its weights and of what it is built from.
        network: of a state dict alone.
    """

    digest: str
    uri: Place[str]
    network: NetworkSettings | None = None


@dataclass(frozen=True, slots=True)
class StartClassifier:
    """The classifier that a training starts from; as `InitClassifier`."""

    model: StoredClassifier
    head: str
    frozen: bool


@dataclass(frozen=True)
class ClassifyTask(Task):
    """A classifier to train on the images of an artifact.

    Attributes:
        images: fingerprint of the images artifact.
        num_images: to train on that have labels.
        network: of a fresh one; None with `init`. The `path` of a language model is the digest of
            its configuration and weights.
        body: folder of that language model.
        tokenizer: folder of that of texts.
        settings: with lanes, window and checkpoint_every (`resolved`).
        code: digests of the user's networks.
        own: a user's objective.
        teachers: of the objective.
        logits: of each teacher, its answers to all training images; none where they are live.
        unlabelled: further images to train on.
        label: name for people.
        device, gpus: of each worker.
    """

    KIND: ClassVar[str] = "models"
    VERSION: ClassVar[int] = 2

    images: str
    num_images: int
    network: NetworkSettings | None
    init: StartClassifier | None
    settings: ClassifierTraining
    num_steps: int
    code: tuple[str, ...] = ()
    own: CustomCode | None = None
    teachers: tuple[StoredClassifier, ...] = ()
    logits: Place[tuple[PartRef, ...]] = ()
    unlabelled: UnlabelledSet | None = None
    body: Place[str] = ""
    tokenizer: Place[str] = ""
    label: Place[str] = ""
    device: Place[str] = "auto"
    gpus: Place[float] = 0

    @property
    def checkpoints(self) -> str:
        return checkpoints_of(self.fingerprint)

    @property
    def sharded(self) -> bool:
        return False

    @property
    def step_units(self) -> int:
        """Images a step."""
        return self.settings.batch_size

    def order(self) -> SampleOrder:
        """The order of its images, or of bags of them; unlabelled images are a second data set."""
        settings, size = self.settings, self.settings.objective.bag_size
        assert settings.lanes is not None and settings.window is not None
        others, labelled = self.unlabelled, (self.num_images // size,)
        sets = [Rows(labelled)]
        if others is not None:
            sets = [Rows(labelled, 1 - others.share), Rows((others.part.num_rows,), others.share)]
        return SampleOrder(
            sets,
            global_batch=settings.batch_size // size,
            seed=settings.seed,
            lanes=settings.lanes,
            window=settings.window,
        )


def resolved(
    settings: ClassifierTraining, num_images: int, num_unlabelled: int = 0
) -> tuple[ClassifierTraining, int]:
    """The settings with numbers in place of `auto` and of defaults, and the number of steps.

    An epoch is as many images as there are, labelled and not.

    Raises:
        InputError: fewer images than a bag has.
    """
    size = settings.objective.bag_size
    if num_images < size:
        raise InputError(f"`objective.bag_size: {size}`: there are {num_images} training images")
    chosen: dict[str, Any] = {}
    if settings.learning_rate == "auto":
        chosen["learning_rate"] = RATE
    if settings.global_batch == "auto":
        chosen["global_batch"] = BATCH // size * size or size
    settings = settings.model_copy(update=chosen)
    total = num_images + num_unlabelled
    num_steps = max(1, round(settings.num_epochs * total / settings.batch_size))
    samples, batch = total // size, settings.batch_size // size
    fewest = min(samples, num_images // size, num_unlabelled or samples)
    chosen = {
        "lanes": settings.lanes or default_lanes(batch, fewest),
        "window": settings.window or samples,
        "checkpoint_every": settings.checkpoint_every or steps_between(num_steps),
    }
    return settings.model_copy(update=chosen), num_steps
