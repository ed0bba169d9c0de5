"""Cells of `teachers.py` on Fashion-MNIST: trainings of classifiers in this process, in a store of
a temporary folder.
"""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from distillation import read_idx

from stillhouse.classification.signals import LogitsTask
from stillhouse.classification.spec import ClassifierTraining
from stillhouse.classification.task import (
    ClassifyTask,
    StartClassifier,
    StoredClassifier,
    resolved,
)
from stillhouse.classification.worker import train_classifier
from stillhouse.distillation.images import ImageSet
from stillhouse.distillation.prepared import (
    IMAGES,
    SPLITS,
    ImageHostSettings,
    Preparation,
    images_table,
)
from stillhouse.fingerprint import fingerprint
from stillhouse.models.network_settings import NetworkSettings
from stillhouse.storage.artifact import Manifest, Store
from stillhouse.storage.task import commit

PAIR = (0, 6)
"""T-shirts and shirts, which weak to strong tells apart; the student knows the other classes."""


def read_fashion(folder: Path) -> dict[str, ImageSet]:
    """`train` and `test` from the four IDX files of Fashion-MNIST."""

    found: dict[str, ImageSet] = {}
    for part, name in (("train", "train"), ("test", "t10k")):
        images = read_idx(folder / f"{name}-images-idx3-ubyte.gz")[:, None]
        labels = read_idx(folder / f"{name}-labels-idx1-ubyte.gz").astype(np.int64)
        found[part] = ImageSet(images, labels, tuple(map(str, range(10))))
    return found


def of_classes(images: ImageSet, classes: tuple[int, ...]) -> ImageSet:
    """The images of some classes, which are numbered anew."""
    rows = np.flatnonzero(np.isin(images.labels, classes))
    labels = np.searchsorted(classes, images.labels[rows])
    names = tuple(images.class_names[one] for one in classes)
    return ImageSet(images.images[rows], labels, names)


class Trainings:
    """Trains classifiers in a store, on one process."""

    def __init__(self, folder: str) -> None:
        self.store = Store(folder)

    def put(self, train: ImageSet, test: ImageSet) -> str:
        """An images artifact; the first fifth of the test part is for validation."""
        cut = len(test) // 5
        rows = np.arange(len(test))
        sets = [train, test.take(rows[:cut]), test.take(rows[cut:])]
        name = fingerprint([str(one.images.sum()) + str(len(one)) for one in sets])
        parts = [
            self.store.put_part(
                f"{IMAGES}/parts/{name}-{s}.parquet", images_table(one), num_tokens=0
            )
            for s, one in zip(SPLITS, sets, strict=True)
        ]
        totals = {"shape": list(train.shape), "class_names": list(train.class_names)}
        self.store.put_manifest(Manifest(IMAGES, name, tuple(parts), {}, {}, totals))
        return name

    def train(self, images: str, learning: Mapping[str, Any], **fields: Any) -> ClassifyTask:
        """A finished training."""
        rows = self.store.get_manifest(IMAGES, images).parts[0].num_rows
        content = {"eval_points": 1, "learning_rate": 2e-3, "global_batch": 64} | learning
        settings, num_steps = resolved(ClassifierTraining.model_validate(content), rows)
        network = fields.pop("network", None)
        task = ClassifyTask(
            images=images,
            num_images=rows,
            network=network and NetworkSettings.model_validate(network),
            init=fields.pop("init", None),
            settings=settings,
            num_steps=num_steps,
            device="cpu",
            **fields,
        )
        train_classifier(self.store, task, lambda *_: None)
        return task

    def accuracy(self, task: ClassifyTask) -> float:
        """On the test part."""
        return self.store.get_manifest("models", task.fingerprint).totals["test"]["accuracy"]

    def stored(self, task: ClassifyTask) -> StoredClassifier:
        return StoredClassifier(task.fingerprint, self.store.path("models", task.fingerprint))


def lsskd_cell(data: Path, labels: int, objective: str, epochs: int, seed: int) -> dict[str, float]:
    """Test accuracy of a ConvNet trained on so many labels."""
    found = read_fashion(data)
    rows = np.random.default_rng(seed).permutation(len(found["train"]))[:labels]
    with TemporaryDirectory() as folder:
        trainings = Trainings(folder)
        images = trainings.put(found["train"].take(np.sort(rows)), found["test"])
        learning = {"num_epochs": epochs, "seed": seed, "objective": {"name": objective}}
        network = {"name": "convnet", "depth": 3, "width": 32}
        return {"accuracy": trainings.accuracy(trainings.train(images, learning, network=network))}


def weak_to_strong_cell(
    data: Path, known: int, others: int, pretrained: int, epochs: int, seed: int
) -> dict[str, float]:
    """Accuracies of the weak model, of the ceiling, and of the students by both losses; PGR.

    Args:
        data: the folder of Fashion-MNIST.
        known: images with labels, for the weak model.
        others: images that it labels.
        pretrained: images of the other classes that the strong model has learned.
        epochs: of every training.
        seed: of draws and weights.
    """
    found = read_fashion(data)
    rest = tuple(one for one in range(10) if one not in PAIR)
    pair, eight = ({k: of_classes(v, c) for k, v in found.items()} for c in (PAIR, rest))
    draws = np.random.default_rng(seed)
    order, other = (draws.permutation(len(one["train"])) for one in (pair, eight))
    with TemporaryDirectory() as folder:
        trainings = Trainings(folder)
        labelled = trainings.put(pair["train"].take(order[:known]), pair["test"])
        unlabelled = trainings.put(pair["train"].take(order[known : known + others]), pair["test"])
        before = trainings.put(eight["train"].take(other[:pretrained]), eight["test"])
        common = {"num_epochs": epochs, "seed": seed}
        weak = trainings.train(
            labelled, common | {"global_batch": 16}, network={"name": "convnet", "width": 4}
        )
        strong = trainings.train(before, common, network={"name": "convnet", "width": 32})
        host = ImageHostSettings(Preparation(unlabelled, zca=False), "cpu").build(trainings.store)
        asked = LogitsTask(unlabelled, trainings.stored(weak), "teachers.0")
        receipt = commit(trainings.store, asked, asked.run(trainings.store, host))
        start = StartClassifier(trainings.stored(strong), head="fresh", frozen=True)

        def student(objective: Mapping[str, Any], **fields: Any) -> float:
            learning = common | {"objective": objective}
            return trainings.accuracy(trainings.train(unlabelled, learning, init=start, **fields))

        taught = {"teachers": (trainings.stored(weak),), "logits": receipt.parts}
        named = {"name": "weak_to_strong", "teachers": [{"path": "weak"}]}
        numbers = {
            "weak": trainings.accuracy(weak),
            "ceiling": student({}),
            "plain": student(named | {"maximum": 0.0}, **taught),
            "confidence": student(named, **taught),
        }
        gap = numbers["ceiling"] - numbers["weak"]
        return numbers | {
            f"pgr_{kind}": (numbers[kind] - numbers["weak"]) / gap if gap else float("nan")
            for kind in ("plain", "confidence")
        }
