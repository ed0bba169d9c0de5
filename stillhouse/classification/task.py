"""The training of a classifier as plain values. Without torch, which the driver never imports."""

from dataclasses import dataclass
from typing import Any, ClassVar

from stillhouse.classification.spec import BATCH, RATE, ClassifierTraining
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
        num_images: to train on.
        network: of a fresh one; None with `init`.
        settings: with lanes, window and checkpoint_every (`resolved`).
        code: digests of the user's networks.
        own: a user's objective.
        teachers: of the objective.
        logits: of each teacher, its answers to all training images; none where they are live.
        label: name for people.
        device, gpus: of each worker.
    """

    KIND: ClassVar[str] = "models"

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
        """The order of its images, or of bags of them."""
        settings, size = self.settings, self.settings.objective.bag_size
        assert settings.lanes is not None and settings.window is not None
        return SampleOrder(
            [Rows((self.num_images // size,))],
            global_batch=settings.batch_size // size,
            seed=settings.seed,
            lanes=settings.lanes,
            window=settings.window,
        )


def resolved(settings: ClassifierTraining, num_images: int) -> tuple[ClassifierTraining, int]:
    """The settings with numbers in place of `auto` and of defaults, and the number of steps.

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
    num_steps = max(1, round(settings.num_epochs * num_images / settings.batch_size))
    samples, batch = num_images // size, settings.batch_size // size
    chosen = {
        "lanes": settings.lanes or default_lanes(batch, samples),
        "window": settings.window or samples,
        "checkpoint_every": settings.checkpoint_every or steps_between(num_steps),
    }
    return settings.model_copy(update=chosen), num_steps
