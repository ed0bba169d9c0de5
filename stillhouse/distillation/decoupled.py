"""Decoupled methods: images made under trained teachers, in independent units.

A method lists its units (`units`), makes the images of one (`make`), and combines them
(`assemble`). A unit draws from its own generator, and its images are a part with its own receipt:
any number of workers makes the same set, and a killed run redoes the units in flight.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from safetensors.torch import save
from torch import Tensor, nn

from stillhouse.distillation.augment import Views
from stillhouse.distillation.evaluate import (
    Objective,
    fit,
    label_views,
    mean_logits,
    towards_classes,
    towards_stored,
)
from stillhouse.distillation.given_teachers import AnyTeacher
from stillhouse.distillation.prepared import (
    WEIGHTS,
    ImageHost,
    ImageTask,
    Prepared,
    file_part,
    require_batch_norm,
)
from stillhouse.distillation.recipes import Protocol, Recipe
from stillhouse.distillation.spec import Method
from stillhouse.distillation.stored_sets import (
    HALF,
    LabelledSet,
    flat_values,
    lists,
    pixel_set,
    set_table,
)
from stillhouse.fingerprint import sha256
from stillhouse.models.network_settings import NetworkSettings
from stillhouse.models.networks import state_tensors
from stillhouse.spec import Count
from stillhouse.storage.artifact import PartRef
from stillhouse.storage.commit import create_or_adopt
from stillhouse.storage.filesystem import read_bytes
from stillhouse.storage.folders import put_folder
from stillhouse.storage.parquet import read_table
from stillhouse.storage.task import Output

LABEL_SEED = 0
"""Seed of the views that stored labels belong to."""
UnitMade = tuple[Tensor, list[float]]
"""A unit's images [n, C, H, W] and its losses."""


@dataclass(frozen=True, slots=True)
class ImageUnit:
    """Images that are made together: `index` numbers a class or a batch, under one teacher."""

    index: int
    teacher: int = 0


@dataclass(frozen=True, slots=True)
class UnitWork:
    """What a unit is made from; `before` are the images of each unit of the stage before."""

    stage: str
    unit: ImageUnit
    prepared: Prepared
    teacher: nn.Module
    before: Sequence[Tensor]


class DecoupledMethod(Method):
    """Images made under trained teachers, without training a student."""

    matching: ClassVar[bool] = False

    labels: Literal["classes", "static", "views"] = Field(
        default="static", description="static: the teachers' logits, one vector an image"
    )
    label_epochs: Count | None = Field(
        default=None,
        description="labels of views: epochs that are stored and then repeat; default every one",
    )

    def units(self, stage: str, num_teachers: int, num_classes: int) -> list[ImageUnit]:
        """The units of a stage, by default one for each class."""
        return [ImageUnit(label) for label in range(num_classes)]

    def make(self, work: UnitWork) -> UnitMade:
        """The standardised images of a unit [n, C, H, W], on any device, and its losses."""
        raise NotImplementedError

    @property
    def label_kind(self) -> str:
        return self.labels

    def image_labels(self, num_classes: int) -> Tensor:
        """Classes int64 of all images in the order of the last stage's units."""
        return torch.arange(num_classes).repeat_interleave(self.images_per_class)

    def assemble(
        self, prepared: Prepared, made: Sequence[Tensor], num_teachers: int
    ) -> LabelledSet:
        """The set, labelled by classes, of the images of each unit of the last stage."""
        labels, ranges = self.image_labels(prepared.num_classes), prepared.standardisation.ranges
        return pixel_set(torch.cat(list(made)), labels, prepared.num_classes, ranges)

    def answer(self, teachers: Sequence[nn.Module], labels: Tensor, views: Views) -> Tensor:
        """What is stored of the teachers' answers to a batch of views: [B, ...]."""
        return mean_logits(teachers, views.images)

    def objective(self, labels: Tensor, stored: Tensor, temperature: float) -> Objective:
        """How a student learns from stored answers [epochs, N, ...]; classes `labels` [N]."""
        return towards_stored(stored, temperature)


def task_rng(*numbers: int) -> np.random.Generator:
    """The generator of one unit, from the method's seed and the unit's indices."""
    return np.random.default_rng(list(numbers))


@dataclass(frozen=True)
class TeacherTask(ImageTask):
    """Trains a teacher: the artifact `models/<fingerprint>`."""

    KIND: ClassVar[str] = "models"

    network: NetworkSettings
    recipe: Recipe
    seed: int

    def make(self, host: ImageHost) -> Output:
        """Train and commit; ModelError where the network has no batch norm."""
        images, labels = host.prepared.train, host.prepared.train_labels
        network = host.prepared.network(self.network, self.seed)
        require_batch_norm(network, f"the teacher {self.network.label}")
        losses = fit(network, images, towards_classes(labels), self.recipe, seed=self.seed)
        weights = save(state_tensors(network))
        put_folder(
            host.store,
            self.fingerprint,
            lambda folder: (folder / WEIGHTS).write_bytes(weights),
            inputs={},
            settings={"network": self.network.model_dump(), "seed": self.seed},
            totals={"role": "teacher", "losses": losses},
        )
        path = f"models/{self.fingerprint}/{WEIGHTS}"
        part = file_part(path, read_bytes(host.store.path(path)), 1)
        counts = {"images": len(images) * len(losses)}
        return Output(counts=counts, info={"losses": losses}, parts=(part,))


@dataclass(frozen=True)
class UnitTask(ImageTask):
    """Makes one unit of a stage; `before` are the parts of the stage before it."""

    method: DecoupledMethod
    stage: str
    unit: ImageUnit
    teacher: AnyTeacher
    before: tuple[PartRef, ...]

    def make(self, host: ImageHost) -> Output:
        before = [unit_images(host, part) for part in self.before]
        teacher = host.teacher(self.teacher)
        work = UnitWork(self.stage, self.unit, host.prepared, teacher, before)
        images, losses = self.method.make(work)
        table = pa.table({"values": lists(images.detach().cpu().flatten(1).numpy())})
        return Output((table,), {"images": len(images)}, {"losses": losses})


def unit_images(host: ImageHost, part: PartRef) -> Tensor:
    """A unit's standardised images [n, C, H, W]."""
    values = flat_values(read_table(host.store.path(part.path)), "values")
    return torch.from_numpy(values).reshape(-1, *host.prepared.shape)


@dataclass(frozen=True)
class AssemblyTask(ImageTask):
    """Combines and labels the units' images; labels of views are a file beside the set."""

    method: DecoupledMethod
    protocol: Protocol
    teachers: tuple[AnyTeacher, ...]
    units: tuple[PartRef, ...]

    def make(self, host: ImageHost) -> Output:
        """The set; `info` has the path of labels of views, and bytes of images and labels."""
        method, prepared = self.method, host.prepared
        teachers = [host.teacher(teacher) for teacher in self.teachers]
        units = [unit_images(host, part) for part in self.units]
        made = method.assemble(prepared, units, len(teachers))
        images, info = made.images.to(prepared.device), dict[str, Any](label_path=None)
        if method.labels == "static":
            made = made.with_logits(mean_logits(teachers, images))
        label_bytes, files = made.stored.labels, dict[str, str]()
        if method.labels not in ("classes", "static"):
            recipe, classes = self.protocol.recipe, made.labels.to(prepared.device)
            answers = label_views(
                lambda views: method.answer(teachers, classes, views),
                images,
                recipe.views,
                batch_size=recipe.batch_size,
                seed=LABEL_SEED,
                num_epochs=min(method.label_epochs or recipe.epochs, recipe.epochs),
            )
            path = f"{self.KIND}/parts/{self.fingerprint}.labels.safetensors"
            data = save({"labels": answers.cpu().contiguous()})
            files[path] = sha256(create_or_adopt(host.store.path(path), data))
            info["label_path"] = path
            label_bytes += answers.numel() * HALF
        info["stored"] = [made.stored.images, label_bytes]
        return Output((set_table(made),), {"images": len(made.images)}, info, files=files)
