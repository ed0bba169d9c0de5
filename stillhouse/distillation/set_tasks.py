"""Tasks on sets of images: baselines of equal bytes, fresh networks that judge, the result.

The artifact `distilled/<fingerprint>` holds `part-00000.parquet` (`stored_sets`). Beside its
manifest lie `preprocessing.safetensors` (mean and deviation a channel, or ZCA's mean, matrix and
inverse) and, where labels are of views, `labels.safetensors`. The manifest's totals hold learning
rate, bytes and how networks were trained on the set (`trained_by`). The pictures of the report are
no part of the artifact, for some are real images: they lie in a part of their own.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa
import torch
from safetensors.torch import load, save
from torch import Tensor

from stillhouse.distillation.augment import augment, draw_augmentation
from stillhouse.distillation.decoupled import DecoupledMethod, unit_images
from stillhouse.distillation.evaluate import (
    accuracy,
    fit,
    towards_classes,
    towards_static,
)
from stillhouse.distillation.prepared import ImageHost, Prepared
from stillhouse.distillation.real_images import herding, k_centre, random_real, without_last
from stillhouse.distillation.recipes import Group, Protocol
from stillhouse.distillation.spec import NetworkSettings
from stillhouse.distillation.stored_sets import (
    LABELS,
    PREPROCESSING,
    LabelledSet,
    pixel_set,
    png_bytes,
    read_set,
    rounded_set,
    set_table,
)
from stillhouse.distillation.tasks import LABEL_SEED, ImageTask
from stillhouse.fingerprint import sha256
from stillhouse.storage.artifact import Manifest, PartRef, Store, libraries
from stillhouse.storage.commit import create_or_adopt
from stillhouse.storage.filesystem import read_bytes
from stillhouse.storage.layout import about
from stillhouse.storage.parquet import read_table
from stillhouse.storage.task import Output

ControlName = Literal["random_real", "herding", "k_centre"]
REAL = -1
"""In place of an iteration: real images of the class."""


def stored_set(store: Store, part: PartRef) -> LabelledSet:
    """The set in a part of the store."""
    return read_set(read_table(store.path(part.path)), part.path)


@dataclass(frozen=True)
class ControlTask(ImageTask):
    """Real images, chosen without any synthesis; where classes do not share evenly, by lot."""

    name: ControlName
    num_images: int
    seed: int

    def make(self, host: ImageHost) -> Output:
        """Choose them: their own 8 bits, or those of whitened ones."""
        prepared = host.prepared
        labels, classes = prepared.train_labels.cpu().numpy(), prepared.num_classes
        each = -(-self.num_images // classes)
        if self.name == "random_real":
            rows = random_real(labels, each, seed=self.seed)
        else:
            choose = herding if self.name == "herding" else k_centre
            rows = choose(prepared.train.flatten(1).cpu().numpy(), labels, each)
        rows = without_last(rows.reshape(-1, each), self.num_images, self.seed)
        there = torch.from_numpy(rows).to(prepared.device)
        images, chosen = prepared.train[there], prepared.train_labels[there]
        norm = prepared.standardisation
        made = (
            pixel_set(images, chosen, classes, norm.mean, norm.std)
            if prepared.zca is None
            else rounded_set(images, chosen, classes)
        )
        return Output((set_table(made),), {"images": len(rows)})


@dataclass(frozen=True, slots=True)
class SetSource:
    """What to train on: `part` of a set, None for all real training images.

    `label_path` is that of stored labels of views, of which `method` knows how to learn.
    """

    part: PartRef | None
    label_path: str | None = None
    method: DecoupledMethod | None = None


@dataclass(frozen=True)
class EvaluationTask(ImageTask):
    """A fresh network, trained on a set by a protocol, and tested once on a part of the images.

    Without DSA groups (`augmentation`) it sees the recipe's views alone.
    """

    source: SetSource
    network: NetworkSettings
    protocol: Protocol
    augmentation: tuple[Group, ...]
    part: Literal["validation", "test"]
    seed: int

    def make(self, host: ImageHost) -> Output:
        """Train and test; the accuracy is in `info`."""
        prepared, source = host.prepared, self.source
        recipe, temperature = self.protocol.recipe, self.protocol.temperature
        network = prepared.network(self.network, self.seed)
        stored: Tensor | None = None
        if source.part is None:
            images, objective = prepared.train, towards_classes(prepared.train_labels)
        else:
            given, device = stored_set(host.store, source.part), prepared.device
            images, labels = given.images.to(device), given.labels.to(device)
            if source.label_path is not None and source.method is not None:
                stored = load(read_bytes(host.store.path(source.label_path)))["labels"].to(device)
                objective = source.method.objective(labels, stored, temperature)
            elif given.label_logits is not None:
                objective = towards_static(given.label_logits.to(device), temperature)
            else:
                objective = towards_classes(labels)
        generator = torch.Generator().manual_seed(self.seed)

        def siamese(batch: Tensor) -> Tensor:
            side = prepared.shape[1]
            draw = draw_augmentation(self.augmentation, len(batch), side, generator)
            return augment(batch, draw)

        losses = fit(
            network,
            images,
            objective,
            recipe,
            seed=self.seed if stored is None else LABEL_SEED,
            augmentation=siamese if stored is None and self.augmentation else None,
            stored_epochs=None if stored is None else len(stored),
        )
        tested = prepared.test if self.part == "test" else prepared.validation
        info = {"accuracy": accuracy(network, *tested), "loss": losses[-1]}
        return Output(counts={"images": len(images) * recipe.epochs}, info=info)


@dataclass(frozen=True, slots=True)
class Shown:
    """Which sets to draw: (iteration, the set's part), and how many images of a class.

    With `real`, real images of each class come first, as iteration `REAL`: those of the parts
    `starts`, by class, or random training images.
    """

    points: tuple[tuple[int, PartRef], ...] = ()
    per_class: int = 0
    real: bool = False
    starts: tuple[PartRef, ...] = ()


@dataclass(frozen=True)
class ResultTask(ImageTask):
    """A set to deliver: the chosen one, with its stored labels of views, if it has such.

    `totals` are of the run (bytes, learning rate and the like), `shown` the sets whose pictures the
    report shows.
    """

    part: PartRef
    label_path: str | None
    inputs: dict[str, Any]
    settings: dict[str, Any]
    totals: dict[str, Any]
    shown: Shown = field(default_factory=Shown)

    def make(self, host: ImageHost) -> Output:
        """Commit the artifact and the pictures: the receipt's two parts."""
        store, prepared = host.store, host.prepared
        given = stored_set(store, self.part)
        table = set_table(given, _pngs(given, prepared), prepared.class_names)
        name = f"{self.KIND}/{self.fingerprint}"
        part = store.put_part(f"{name}/part-00000.parquet", table, num_tokens=0)
        preprocessing = prepared.preprocessing.tensors()
        files = {
            PREPROCESSING: save({n: t.float().cpu().contiguous() for n, t in preprocessing.items()})
        }
        if self.label_path is not None:
            files[LABELS] = read_bytes(store.path(self.label_path))
        digests = {
            file: sha256(create_or_adopt(store.path(about(name), file), data))
            for file, data in files.items()
        }
        totals = self.totals | {
            "class_names": list(prepared.class_names),
            "shape": list(prepared.shape),
            "preprocessing": "zca" if prepared.zca is not None else "mean_std",
            "file_bytes": part.num_bytes,
        }
        made_by = {"device": prepared.device.type} | libraries()
        store.put_manifest(
            Manifest(
                self.KIND,
                self.fingerprint,
                (part,),
                self.inputs,
                self.settings,
                totals,
                made_by,
                digests,
            )
        )
        drawn = store.put_part(
            f"{self.KIND}/parts/{self.fingerprint}-pictures.parquet",
            pictures(host, self.shown),
            num_tokens=0,
        )
        return Output(counts={"images": part.num_rows}, parts=(part, drawn))


def _pngs(given: LabelledSet, prepared: Prepared) -> list[bytes]:
    """A picture of every row."""
    if given.apart is None:
        return png_bytes(prepared.preprocessing.pixels(given.images))
    real = given.images[: given.apart.num_real]
    return png_bytes(prepared.preprocessing.pixels(real)) + png_bytes(given.apart.pictures())


def pictures(host: ImageHost, shown: Shown) -> pa.Table:
    """Rows of point (an iteration, or `REAL`), label and png."""
    prepared, rows = host.prepared, list[dict[str, object]]()

    def draw(point: int, images: Tensor, labels: Tensor) -> None:
        pngs = png_bytes(prepared.preprocessing.pixels(images.cpu()))
        for label, png in zip(labels.tolist(), pngs, strict=True):
            rows.append({"point": point, "label": label, "png": png})

    if shown.real and shown.starts:
        for label, part in enumerate(shown.starts):
            first = unit_images(host, part)[: shown.per_class]
            draw(REAL, first, torch.full((len(first),), label))
    elif shown.real:
        labels = prepared.train_labels.cpu()
        least = int(torch.bincount(labels).min())
        chosen = random_real(labels.numpy(), min(shown.per_class, least), seed=0)
        there = torch.from_numpy(chosen)
        draw(REAL, prepared.train[there.to(prepared.device)], labels[there])
    for iteration, part in shown.points:
        given = stored_set(host.store, part)
        of_class = [(given.labels == label).nonzero()[:, 0] for label in given.labels.unique()]
        firsts = torch.cat([of_one[: shown.per_class] for of_one in of_class])
        draw(iteration, given.images[firsts], given.labels[firsts])
    return pa.Table.from_pylist(rows)
