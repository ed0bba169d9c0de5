"""Tasks on sets of images: baselines of equal bytes, evaluation by fresh networks, the result.

The artifact `distilled/<fingerprint>` holds `part-00000.parquet` (`stored_sets`). Beside its
manifest lie `preprocessing.safetensors` (mean and deviation a channel, or ZCA's mean, matrix and
inverse) and, where labels are of views, `labels.safetensors`. The manifest's totals hold learning
rate, bytes and how networks were trained on the set (`trained_by`). The pictures of the report are
a part outside the artifact, because some show real images.
"""

from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import torch
from safetensors.torch import load, save
from torch import Tensor

from stillhouse.distillation.augment import augment, draw_augmentation
from stillhouse.distillation.decoupled import LABEL_SEED, DecoupledMethod, unit_images
from stillhouse.distillation.evaluate import (
    accuracy,
    fit,
    towards_classes,
    towards_static,
)
from stillhouse.distillation.prepared import ImageHost, ImageTask, Prepared
from stillhouse.distillation.real_images import herding, k_centre, random_real, without_last
from stillhouse.distillation.recipes import Group, Protocol
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
from stillhouse.fingerprint import sha256
from stillhouse.models.network_settings import NetworkSettings
from stillhouse.storage.artifact import Manifest, PartRef, Store, libraries
from stillhouse.storage.commit import create_or_adopt
from stillhouse.storage.filesystem import read_bytes
from stillhouse.storage.layout import about
from stillhouse.storage.parquet import read_table
from stillhouse.storage.task import Output

ControlName = Literal["random_real", "herding", "k_centre"]
REAL = -1
"""In place of an iteration: real images."""
_DRAWN_PER_CLASS = 10


def stored_set(store: Store, part: PartRef) -> LabelledSet:
    return read_set(read_table(store.path(part.path)), part.path)


@dataclass(frozen=True)
class ControlTask(ImageTask):
    """Real images as a baseline; a remainder that does not fill all classes is drawn."""

    name: ControlName
    num_images: int
    seed: int

    def make(self, host: ImageHost) -> Output:
        """Choose the images, stored as their own 8 bits (whitened ones as 256 levels)."""
        prepared = host.prepared
        labels, classes = prepared.train_labels.cpu().numpy(), prepared.num_classes
        per_class = -(-self.num_images // classes)
        if self.name == "random_real":
            rows = random_real(labels, per_class, seed=self.seed)
        else:
            choose = herding if self.name == "herding" else k_centre
            rows = choose(prepared.train.flatten(1).cpu().numpy(), labels, per_class)
        rows = without_last(rows.reshape(-1, per_class), self.num_images, self.seed)
        on_device = torch.from_numpy(rows).to(prepared.device)
        images, chosen = prepared.train[on_device], prepared.train_labels[on_device]
        if prepared.zca is None:
            made = pixel_set(images, chosen, classes, prepared.standardisation.ranges)
        else:
            made = rounded_set(images, chosen, classes)
        return Output((set_table(made),), {"images": len(rows)})


@dataclass(frozen=True, slots=True)
class SetSource:
    """What to train on: the `part` of a set, or all real training images (None).

    `label_path` leads to stored labels of views, `method` says how to learn from them.
    """

    part: PartRef | None
    label_path: str | None = None
    method: DecoupledMethod | None = None


@dataclass(frozen=True)
class EvaluationTask(ImageTask):
    """Trains a fresh network on a set and tests it once; `augmentation` has DSA's groups."""

    source: SetSource
    network: NetworkSettings
    protocol: Protocol
    augmentation: tuple[Group, ...]
    part: Literal["validation", "test"]
    seed: int

    def make(self, host: ImageHost) -> Output:
        """`info` has the accuracy and the last epoch's loss."""
        prepared, source = host.prepared, self.source
        recipe, temperature = self.protocol.recipe, self.protocol.temperature
        network = prepared.network(self.network, self.seed)
        answers: Tensor | None = None
        if source.part is None:
            images, objective = prepared.train, towards_classes(prepared.train_labels)
        else:
            small, device = stored_set(host.store, source.part), prepared.device
            images, labels = small.images.to(device), small.labels.to(device)
            if source.label_path is not None and source.method is not None:
                stored = load(read_bytes(host.store.path(source.label_path)))
                answers = stored["labels"].to(device)
                objective = source.method.objective(labels, answers, temperature)
            elif small.label_logits is not None:
                objective = towards_static(small.label_logits.to(device), temperature)
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
            seed=self.seed if answers is None else LABEL_SEED,
            augmentation=siamese if answers is None and self.augmentation else None,
            stored_epochs=None if answers is None else len(answers),
        )
        tested = prepared.test if self.part == "test" else prepared.validation
        info = {"accuracy": accuracy(network, *tested), "loss": losses[-1]}
        return Output(counts={"images": len(images) * recipe.epochs}, info=info)


@dataclass(frozen=True)
class ResultTask(ImageTask):
    """Delivers the chosen set, and the pictures of the report.

    Attributes:
        part: of the set.
        label_path: of stored labels of views, or None.
        inputs, settings, totals: of the manifest.
        shown: sets to draw, by iteration.
        real: whether to draw real images of each class as well (`REAL`).
        starts: those that the set began as, by class; none for random training images.
    """

    part: PartRef
    label_path: str | None
    inputs: dict[str, Any]
    settings: dict[str, Any]
    totals: dict[str, Any]
    shown: tuple[tuple[int, PartRef], ...] = ()
    real: bool = False
    starts: tuple[PartRef, ...] = ()

    def make(self, host: ImageHost) -> Output:
        """Commit the artifact and the pictures, the receipt's two parts."""
        store, prepared = host.store, host.prepared
        small = stored_set(store, self.part)
        table = set_table(small, _pngs(small, prepared), prepared.class_names)
        name = f"{self.KIND}/{self.fingerprint}"
        part = store.put_part(f"{name}/part-00000.parquet", table, num_tokens=0)
        tensors = prepared.preprocessing.tensors()
        files = {PREPROCESSING: save({n: t.float().cpu().contiguous() for n, t in tensors.items()})}
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
        named = self.KIND, self.fingerprint, (part,)
        store.put_manifest(Manifest(*named, self.inputs, self.settings, totals, made_by, digests))
        path = f"{self.KIND}/parts/{self.fingerprint}-pictures.parquet"
        drawn = store.put_part(path, self.pictures(host), num_tokens=0)
        return Output(counts={"images": part.num_rows}, parts=(part, drawn))

    def pictures(self, host: ImageHost) -> pa.Table:
        """Rows of point (an iteration, or `REAL`), label and png, up to 10 of each class."""
        prepared, rows = host.prepared, list[dict[str, object]]()

        def draw(point: int, images: Tensor, labels: Tensor) -> None:
            pngs = png_bytes(prepared.preprocessing.pixels(images.cpu()))
            for label, png in zip(labels.tolist(), pngs, strict=True):
                rows.append({"point": point, "label": label, "png": png})

        for label, part in enumerate(self.starts if self.real else ()):
            first = unit_images(host, part)[:_DRAWN_PER_CLASS]
            draw(REAL, first, torch.full((len(first),), label))
        if self.real and not self.starts:
            labels = prepared.train_labels.cpu()
            per_class = min(_DRAWN_PER_CLASS, int(torch.bincount(labels).min()))
            chosen = torch.from_numpy(random_real(labels.numpy(), per_class, seed=0))
            draw(REAL, prepared.train[chosen.to(prepared.device)], labels[chosen])
        for iteration, part in self.shown:
            small = stored_set(host.store, part)
            by_class = [(small.labels == label).nonzero()[:, 0] for label in small.labels.unique()]
            first = torch.cat([of_class[:_DRAWN_PER_CLASS] for of_class in by_class])
            draw(iteration, small.images[first], small.labels[first])
        return pa.Table.from_pylist(rows)


def _pngs(small: LabelledSet, prepared: Prepared) -> list[bytes]:
    """A picture of every row."""
    factored, pixels = small.factored, prepared.preprocessing.pixels
    if factored is None:
        return png_bytes(pixels(small.images))
    return png_bytes(pixels(small.images[: factored.num_real])) + png_bytes(factored.pictures())
