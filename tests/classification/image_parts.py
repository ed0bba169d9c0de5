"""A small images artifact in a store, and trainings of classifiers on it."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import torch

from stillhouse.classification.learner import ClassifierFacts
from stillhouse.classification.spec import ClassifierTraining
from stillhouse.classification.task import ClassifyTask, resolved
from stillhouse.classification.unlabelled import UnlabelledSet
from stillhouse.distillation.images import ImageSet
from stillhouse.distillation.prepared import IMAGES, SPLITS, images_table
from stillhouse.distillation.stored_sets import lists
from stillhouse.models.network_settings import NetworkSettings
from stillhouse.models.networks import build_network
from stillhouse.storage.artifact import Manifest

NAME, CLASSES, SIDE = "1" * 64, 4, 8
COUNTS = (96, 24, 24)
SMALL = {"name": "convnet", "depth": 2, "width": 8}
VIT = {"name": "vit", "depth": 2, "width": 16, "options": {"heads": 2}}


class KilledError(Exception):
    """Ends a training as a kill does."""


def stop_at(step):
    """A listener that ends a training after a step."""

    def tell(kind, content):
        if kind == "point" and content["step"] == step:
            raise KilledError

    return tell


def quiet(*_):
    return None


def make_set(seed, count):
    """Images whose brightest quarter is their class, under noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    images = rng.integers(0, 120, (count, 1, SIDE, SIDE))
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 100
    names = tuple(f"class {i}" for i in range(CLASSES))
    return ImageSet(images.astype(np.uint8), labels.astype(np.int64), names)


def put_images(store):
    """The images artifact `NAME`."""
    sets = [make_set(seed, count) for seed, count in enumerate(COUNTS)]
    parts = [
        store.put_part(f"{IMAGES}/parts/{split}.parquet", images_table(one), num_tokens=0)
        for split, one in zip(SPLITS, sets, strict=True)
    ]
    totals = {"shape": list(sets[0].shape), "class_names": list(sets[0].class_names)}
    store.put_manifest(Manifest(IMAGES, NAME, tuple(parts), {}, {}, totals))


def put_unlabelled(store, count=40):
    """Images without labels, half of every batch."""
    pixels = make_set(9, count).images.reshape(count, -1)
    table = pa.table({"pixels": lists(pixels)})
    part = store.put_part(f"{IMAGES}/parts/unlabelled.parquet", table, num_tokens=0)
    return UnlabelledSet(part, 0.5)


def make_task(
    objective=None, network=None, *, teachers=(), logits=(), init=None, unlabelled=None, **learning
):
    """A training of 30 steps, unless `learning` says otherwise."""
    content = {"num_epochs": 5, "global_batch": 16, "learning_rate": 3e-3, "dtype": "float32"}
    content |= {"eval_points": 3, "checkpoint_every": 10, "objective": objective or {}}
    others = unlabelled.part.num_rows if unlabelled else 0
    settings = ClassifierTraining.model_validate(content | learning)
    settings, num_steps = resolved(settings, COUNTS[0], others)
    return ClassifyTask(
        images=NAME,
        num_images=COUNTS[0],
        network=None if init else NetworkSettings.model_validate(network or SMALL),
        init=init,
        settings=settings,
        num_steps=num_steps,
        teachers=tuple(teachers),
        logits=tuple(logits),
        unlabelled=unlabelled,
        device="cpu",
    )


def losses(store, task):
    """Of the points of a finished training."""
    return [point["loss"] for point in manifest(store, task).totals["points"]]


def manifest(store, task):
    return store.get_manifest("models", task.fingerprint)


def with_seed(task, seed):
    """The same training from another seed."""
    return replace(task, settings=task.settings.model_copy(update={"seed": seed}))


def batch(seed=0, size=8):
    """Images, and signals of them with a teacher's logits."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 1, 8, 8, generator=generator)
    teacher = 3 * torch.randn(size, CLASSES, generator=generator)
    labels = torch.randint(0, CLASSES, (size,), generator=generator)
    return images, {"labels": labels, "logits.0": teacher.half(), "rows": torch.arange(size)}


def facts(network, classes=CLASSES):
    return ClassifierFacts(network, classes, COUNTS[0], (1, 8, 8), teachers=(1.0,))


def network_of(classes=CLASSES, settings=None, seed=0):
    made = NetworkSettings.model_validate(settings or SMALL)
    return build_network(made, (1, 8, 8), classes, seed)
